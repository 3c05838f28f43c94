"""The tables of models: what the tests compare, and what the engine says of small models of each family.

Writing them builds a small model of every family, which takes a minute or two: no part of what the fast tests do.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from layerstream.core.formats import FORMATS
from layerstream.errors import UnsupportedModel
from layerstream.model.families import check_supported
from layerstream.model.skeleton import Skeleton, build_skeleton

from tests.models import FAMILIES, SmallModel, make_model
from tests.models.refused import NOT_ALONE, REFUSED
from tests.quantised import PACKERS
from tests.reference import test_gguf, test_quantised
from tests.reference.test_families import MODES, modes_of

NO, ALWAYS = "", "✓"  # the same comparison is made of every family
COLUMNS = ("model type", "its text", "modes", "quantised", "GGUF", "experts", "guesses", "store")


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one model type, by all of its small models.

    Attributes:
        text: the model type of its language model; ``""``: it is one.
        modes: that it is compared in.
        gguf: the architectures of GGUF files that are opened as it.
        routes: whether its experts are read one by one.
    """

    text: str
    modes: tuple[str, ...]
    gguf: tuple[str, ...]
    routes: bool


def list_families() -> str:
    """A table of the language models, and one of those that see or hear."""
    names = defaultdict(list)
    for name, small in FAMILIES.items():
        names[small.model_type].append(name)
    rows = {kind: row_of(kind, names[kind]) for kind in sorted(names)}
    texts = {kind: row for kind, row in rows.items() if not row.text}
    wholes = {kind: row for kind, row in rows.items() if row.text}
    return f"### Language models\n\n{draw(texts)}\n\n### Models that see or hear\n\n{draw(wholes)}"


def row_of(model_type: str, names: Iterable[str]) -> Row:
    """That of *model_type*, whose small models have *names*."""
    skeletons = {name: _skeleton(name) for name in names}
    config = next(iter(skeletons.values())).config.model_type
    is_alone = any(skeleton.trace.is_alone for skeleton in skeletons.values())
    return Row(
        text="" if config == model_type else config,
        modes=tuple(mode for mode in modes_of(next(iter(skeletons))) if mode != "cut" or not is_alone),
        gguf=tuple(sorted(set(_architectures(model_type, skeletons)))),
        routes=any(skeleton.routed for skeleton in skeletons.values()),
    )


def _architectures(model_type: str, names: Collection[str]) -> Iterator[str]:
    """Those of GGUF files that are compared as small models *names*, or as random ones of *model_type*."""
    yield from {kind for name, (kind, _) in test_gguf.ARCHITECTURES.items() if name in names}
    for kind, family, _ in test_gguf.READ.values():
        if getattr(transformers, f"{family}Config").model_type == model_type:
            yield kind


def draw(rows: Mapping[str, Row]) -> str:
    """The table of *rows*, by model type."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for model_type, row in rows.items():
        modes = "all" if row.modes == MODES else ", ".join(row.modes)
        cells = [f"`{model_type}`", f"`{row.text}`" if row.text else NO, modes, ALWAYS, ", ".join(row.gguf)]
        cells += ["one by one" if row.routes else NO, ALWAYS, ALWAYS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def list_formats() -> str:
    """The quantised formats that are compared with their decoded weights."""
    folders = sorted({*PACKERS, *test_quantised.BITSANDBYTES, "int8 (bitsandbytes)", "MXFP4"})
    return "\n".join(
        [
            "| where | formats |",
            "|---|---|",
            f"| folders | {', '.join(folders)} |",
            f"| `.gguf` files | {', '.join(test_gguf.NAMED)} |",
            f"| made by `quantization=` | {', '.join(FORMATS)} |",
        ]
    )


def list_refused() -> str:
    """The reasons that the engine gives, each with the families that it gives it for."""
    reasons = defaultdict(list)
    for small in (REFUSED | NOT_ALONE).values():
        reasons[reason_of(small).replace(repr(small.model_type), "…")].append(f"`{small.model_type}`")
    rows = (f"| {', '.join(sorted(names))} | {reason} |" for reason, names in sorted(reasons.items()))
    return "\n".join(["| families | reason |", "|---|---|", *rows])


def reason_of(small: SmallModel) -> str:
    """What the engine says when it refuses *small*, whatever it is allowed."""
    config = small.config()
    try:
        check_supported(config)
        with tempfile.TemporaryDirectory() as folder:
            small.loader.from_config(config).save_pretrained(folder)
            build_skeleton(Path(folder), allow_untested=True)
    except UnsupportedModel as error:
        return str(error)
    raise AssertionError(f"{small.model_type} is not refused")


def _skeleton(name: str) -> Skeleton:
    with tempfile.TemporaryDirectory() as folder:
        make_model(name, Path(folder))
        return build_skeleton(Path(folder))
