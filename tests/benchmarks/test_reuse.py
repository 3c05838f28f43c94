"""What prompts share is counted token by token; every pipeline runs, and reuses no more than prompts share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reuse import sharing as module
from benchmarks.reuse.__main__ import ROWS, measure, run, summarise
from benchmarks.reuse.corpus import NUM_RETRIEVED, PASSAGE_TOKENS, Corpus, draw_corpus
from benchmarks.reuse.setting import stretch
from benchmarks.reuse.sharing import sharing


def options(**given: object) -> argparse.Namespace:
    base = {"reuse": "exact", "memory": None, "chunk_tokens": 32, "model": "demo", "seconds": True, "seeds": 1}
    sizes = {"documents": 4, "passages": 20, "questions": 3, "rows": [], "variants": [], "json": None}
    return argparse.Namespace(**{**base, **sizes, **given})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return draw_corpus(1, lambda text: len(text) // 3, 4, 20, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stretch("demo", tmp_path_factory.mktemp("stretched"))


def test_a_corpus_has_what_it_says(corpus: Corpus) -> None:
    assert len(corpus.documents) == 4
    assert len(corpus.passages) == 20
    assert all(len(passage.text) // 3 in PASSAGE_TOKENS for passage in corpus.passages)
    assert all(len(corpus.find(question)) == NUM_RETRIEVED for question in corpus.questions)
    assert corpus.questions == draw_corpus(1, lambda text: len(text) // 3, 4, 20, 3).questions


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=5))
def test_sharing_is_what_it_is_defined_as(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUN_TOKENS", 3)
        found = sharing(prompts)
    ideal = seen = 0
    for number, prompt in enumerate(prompts):
        starts = [k for k in range(len(prompt) + 1) if any(prompt[:k] == p[:k] for p in prompts[:number])]
        ideal += min(max(starts, default=0), len(prompt) - 1)
        runs = {tuple(p[at : at + 3]) for p in prompts[:number] for at in range(len(p) - 2)}
        covered = {at + i for at in range(len(prompt) - 2) if tuple(prompt[at : at + 3]) in runs for i in range(3)}
        seen += max(len(covered), max(starts, default=0))
    assert (found.prompt_tokens, found.ideal_tokens, found.seen_tokens) == (sum(map(len, prompts)), ideal, seen)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row[0] for row in ROWS])
def test_every_pipeline_runs(number: int, corpus: Corpus, model: str) -> None:
    _, build, variants = ROWS[number]
    variant = next(variant for variant in reversed(variants) if variant != "warmed")
    figures = measure(model, build, variant, corpus, options())
    assert figures["reused_tokens"] <= figures["ideal_tokens"]
    assert figures["ideal_tokens"] <= figures["seen_tokens"] <= figures["prompt_tokens"]
    assert len(figures["first_token_seconds"]) == 3
    assert 0 <= summarise([figures])["reused"] <= 1


def test_warmed_passages_are_reused_at_the_first_question(corpus: Corpus, model: str) -> None:
    build = next(build for name, build, _ in ROWS if name == "LlamaIndex compact")
    warmed, learned = (measure(model, build, variant, corpus, options()) for variant in ("warmed", "learned"))
    assert warmed["reused_tokens"] > learned["reused_tokens"]


def test_the_table_and_its_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"rows": ["compact"], "variants": ["as found"], "json": tmp_path / "reuse.json", "questions": 2}
    run(model, options(**chosen))
    (row,) = json.loads((tmp_path / "reuse.json").read_text())["rows"]
    assert row["pipeline"] == "LlamaIndex compact"
    assert "seen anywhere" in capsys.readouterr().out
    off = {**chosen, "reuse": "off", "json": tmp_path / "off.json"}
    run(model, options(**off))
