"""What pages say of the code is true: links, paths, help texts, variables, the picture of the floors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from layerstream.model.families import TESTED

from docs.generate import charts, house
from docs.generate.parts import DOCS, SLOW_PARTS, filled, should_be

ROOT = DOCS.parent
ENGINE = ROOT / "engine" / "layerstream"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
README_BYTES = 8000


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_are_named_are_there(page: Path) -> None:
    """A page of the repository's root says them from there; the others may leave out ``engine/layerstream/``."""
    for named in re.findall(r"`([\w./]+/[\w.]*|\w+/[\w/.]+\.py)`", page.read_text("utf-8")):
        assert (ROOT / named).exists() or (ENGINE / named).exists(), named


def test_what_comes_from_the_code_is_as_the_code_says() -> None:
    for path, text in should_be().items():
        assert path.read_text("utf-8") == text, f"{_name(path)} is stale: python -m docs.generate writes it"


@pytest.mark.families
def test_the_tables_of_models_are_as_the_models_are() -> None:
    for path, text in filled(SLOW_PARTS).items():
        assert path.read_text("utf-8") == text, f"{_name(path)} is stale: python -m docs.generate writes it"


def test_every_tested_family_is_in_the_tables_of_models() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "models.md").read_text("utf-8"), flags=re.M)
    assert sorted(rows) == sorted(TESTED)


def test_every_variable_is_in_its_page_and_no_other() -> None:
    code = "".join(path.read_text("utf-8") for path in ENGINE.rglob("*.py"))
    page = (DOCS / "environment.md").read_text("utf-8")
    assert set(re.findall(r"\bLAYERSTREAM_[A-Z_]+\b", page)) == set(re.findall(r"\bLAYERSTREAM_[A-Z_]+\b", code))


def test_every_page_is_in_the_site() -> None:
    named = re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_the_workflow_runs_what_everybody_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == [".ci/run"]


def test_rooms_are_on_floors_without_a_cycle() -> None:
    graph = house.rooms()
    assert house.cycles(graph) == []
    floors = house.floors(graph)
    level = {room: number for number, floor in enumerate(floors) for room in floor}
    assert all(level[above] < level[below] for above, below in graph.edges)
    assert floors[-1] == ["errors"]


def test_the_house_is_counted() -> None:
    lines = list(house.report(house.ENGINE))
    assert re.fullmatch(r"\d+ modules, \d+ of them loose: __init__, .*", lines[0])
    assert re.fullmatch(r"\d+ rooms, \d+ arrows between them", lines[1])
    assert lines[2] == "cycles of rooms: none"


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = charts.bars("Seconds", [("ours", 1.0), ("<another>", 4.0)])
    ours, another = (int(width) for width in re.findall(r'<rect x="\d+" y="\d+" width="(\d+)"', drawn))
    assert another == pytest.approx(4 * ours, abs=4)
    assert "&lt;another&gt;" in drawn


def _anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
