"""The plan of the house, read from the code: rooms, what they import, and the floors that this makes of them.

    python -m docs.generate.house [FOLDER]

prints rooms, loose modules, import arrows, cycles, and what is largest, of the package ``layerstream`` in FOLDER
(``engine`` if not given). A *room* is a package or a module right behind the front door; an *arrow* goes from a room to
one that it imports; a *floor* holds the rooms that import nothing but rooms of lower floors.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx as nx

PACKAGE = "layerstream"
ENGINE = Path(__file__).parent.parent.parent / "engine"
NUM_LARGEST = 5


def modules(*, at_load_time: bool = False) -> nx.DiGraph:
    """The modules of the package and their imports; *at_load_time*: without those for type checkers alone."""
    found = grimp.build_graph(PACKAGE, exclude_type_checking_imports=at_load_time, cache_dir=None)
    graph = nx.DiGraph()
    for module in sorted(found.modules - {PACKAGE}):
        graph.add_node(module)
        targets = found.find_modules_directly_imported_by(module) - {PACKAGE}
        graph.add_edges_from((module, target) for target in sorted(targets))
    return graph


def rooms() -> nx.DiGraph:
    """The rooms and their arrows."""
    graph = nx.DiGraph()
    for importer in (found := modules()):
        graph.add_node(_room(importer))
        graph.add_edges_from(
            (_room(importer), _room(target)) for target in found[importer] if _room(target) != _room(importer)
        )
    return graph


def floors(graph: nx.DiGraph) -> list[list[str]]:
    """The rooms of *graph* by floor, the top floor first; raises where there is a cycle."""
    return [sorted(floor) for floor in nx.topological_generations(_reduced(graph))]


def cycles(graph: nx.DiGraph) -> list[list[str]]:
    """What imports itself by some way, in groups."""
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def draw() -> str:
    """The floors as a Mermaid picture: of the arrows those that do not follow from others."""
    graph = rooms()
    lines = ["```mermaid", "flowchart TB"]
    for number, floor in enumerate(floors(graph)):
        lines += [f'  subgraph floor{number}[" "]', "    direction LR"]
        lines += [f'    {name}["{name}{"/" if _is_package(name) else ".py"}"]' for name in floor]
        lines.append("  end")
    lines += [f"  {above} --> {below}" for above, below in sorted(_reduced(graph).edges)]
    return "\n".join([*lines, "```"])


def list_rooms() -> str:
    """A table of the rooms, each with the first sentence that its own docstring says about it."""
    lines = ["| room | what it is |", "|---|---|"]
    for floor in floors(rooms()):
        for name in floor:
            path = ENGINE / PACKAGE / (f"{name}/__init__.py" if _is_package(name) else f"{name}.py")
            lines.append(f"| `{name}{'/' if _is_package(name) else '.py'}` | {_first_sentence(path)} |")
    return "\n".join(lines)


def report(engine: Path) -> Iterator[str]:
    """The figures, line by line, of the package in the folder *engine*."""
    graph, folder = rooms(), engine / PACKAGE
    loose = sorted(path.stem for path in folder.glob("*.py"))
    yield f"{len(list(folder.rglob('*.py')))} modules, {len(loose)} of them loose: {', '.join(loose)}"
    yield f"{len(graph)} rooms, {graph.number_of_edges()} arrows between them"
    yield f"cycles of rooms: {cycles(graph) or 'none'}"
    yield f"cycles of modules at load time: {cycles(modules(at_load_time=True)) or 'none'}"
    functions = sorted(_functions(folder), reverse=True)
    yield f"{len(functions)} functions; the longest:"
    yield from (f"  {lines:4} lines  {name}" for lines, _, name in functions[:NUM_LARGEST])
    made = sorted(((arguments, name) for _, arguments, name in functions if name.endswith("__init__")), reverse=True)
    yield "constructors with the most arguments:"
    yield from (f"  {arguments:4}        {name}" for arguments, name in made[:NUM_LARGEST])


def _room(module: str) -> str:
    return module.split(".")[1]


def _reduced(graph: nx.DiGraph) -> nx.DiGraph:
    return nx.transitive_reduction(graph)


def _is_package(name: str) -> bool:
    return (ENGINE / PACKAGE / name).is_dir()


def _first_sentence(path: Path) -> str:
    said = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    for mark in (":class:`", ":mod:`", ":func:`", "``"):
        said = said.replace(mark, "`")
    return said.split(". ")[0].rstrip(".").replace("|", "\\|")


def _functions(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Lines, arguments (without ``self``) and name of every function."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        owners = {id(child): f"{owner.name}." for owner in classes for child in owner.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                owner = owners.get(id(node), "")
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                name = f"{path.relative_to(folder)}: {owner}{node.name}"
                yield _num_lines(node), len(arguments) - bool(owner), name


def _num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, its docstring left out."""
    body = node.body if ast.get_docstring(node) is None else node.body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="The plan of the house, in figures.")
    parser.add_argument("folder", type=Path, nargs="?", default=ENGINE)
    engine = parser.parse_args().folder.resolve()
    sys.path.insert(0, str(engine))
    for line in report(engine):
        print(line)


if __name__ == "__main__":
    main()
