"""Which files of a folder make the checkpoint, where several could: those that transformers would take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerstream.errors import CheckpointNotFound, InvalidHeader, UnsupportedFormat

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
ADAPTER = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SIDE_FILES = ("adapter_", "consolidated", "training_args", "optimizer")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is read of a folder.

    Attributes:
        index: says which files count; ``None``: *files* are all.
        left_out: files of weights that could have been meant.
        adapter: whether an adapter lies beside them, which is not read.
    """

    files: tuple[str, ...] = ()
    index: str | None = None
    left_out: tuple[str, ...] = ()
    adapter: bool = False


def select_files(folder: Path, names: Iterable[str], named: str | None = None) -> Selection:
    """Choose among the *names* of the files in *folder*.

    A single ``model.safetensors`` comes before an index, as in transformers; an index before files that no index
    names, which transformers does not take at all. Hidden files (``._model.safetensors`` of macOS) are nobody's.

    Args:
        named: the file, or index, that the config names.

    Raises:
        CheckpointNotFound: there are no weights, or shards are missing.
        UnsupportedFormat: pickles, or an adapter, and nothing else.
        InvalidHeader: more than one set of shards, and nothing says which.
    """
    visible = sorted(name for name in names if not name.startswith("."))
    weights = [name for name in visible if name.endswith(".safetensors")]
    indices = [n for n in visible if n.endswith(".safetensors.index.json") and not n.startswith(_SIDE_FILES)]
    adapter = ADAPTER_CONFIG in visible or any(name.startswith(ADAPTER) for name in visible)
    model = [name for name in weights if not name.startswith(_SIDE_FILES)]
    named = named if named in visible else None
    single = named if named in weights else SINGLE if SINGLE in weights and named is None else None
    if single is not None:
        return Selection((single,), left_out=(*indices, *(n for n in model if n != single)), adapter=adapter)
    if indices:
        index = named if named in indices else INDEX if INDEX in indices else indices[0]
        return Selection(index=index, adapter=adapter)
    files = model or [name for name in weights if not name.startswith(ADAPTER)]
    if not files:
        raise _nothing(folder, visible, adapter)
    _check_shards(folder, files)
    return Selection(tuple(files), adapter=adapter)


def _check_shards(folder: Path, files: list[str]) -> None:
    """Files that count themselves are all there, and of one set."""
    sets: dict[tuple[str, str], set[int]] = {}
    for found in filter(None, map(_SHARD.fullmatch, files)):
        sets.setdefault((found.group(1), found.group(3)), set()).add(int(found.group(2)))
    if len(sets) > 1:
        shown = " and ".join(f"{stem}-…-of-{count}.safetensors" for stem, count in sorted(sets)[:3])
        raise InvalidHeader(
            f"{folder}: has {shown}, and no {INDEX} that says which are the model; keep one set, or put back the index"
        )
    for (stem, count), numbers in sets.items():
        missing = sorted(set(range(1, min(int(count), 10_000) + 1)) - numbers)
        if missing:
            raise CheckpointNotFound(
                f"{folder}: {stem}-{missing[0]:05}-of-{count}.safetensors is missing, and {len(missing) - 1} more; "
                "fetch the model again"
            )


def _nothing(folder: Path, visible: list[str], adapter: bool) -> CheckpointNotFound | UnsupportedFormat:
    if adapter:
        return UnsupportedFormat(
            f"{folder}: only an adapter, and not the model that it is for ({ADAPTER_CONFIG} names it); load both with "
            "peft, merge_and_unload() and save_pretrained(), and open what that writes"
        )
    if pickles := [name for name in visible if name.endswith(_PICKLES)]:
        return UnsupportedFormat(
            f"{folder}: weights only as pickles ({', '.join(pickles[:3])}), which can run code when opened; "
            "save them once with transformers' save_pretrained(), which writes safetensors"
        )
    if files := [name for name in visible if name.endswith(".gguf")]:
        return CheckpointNotFound(f"{folder}: only GGUF files; pass one of them as the model: {', '.join(files[:5])}")
    return CheckpointNotFound(f"{folder}: no *.safetensors files; found: {', '.join(visible[:8]) or 'nothing'}")
