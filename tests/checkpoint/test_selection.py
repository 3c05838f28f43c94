"""Files beside each other: which of them make the checkpoint, as transformers would choose."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from layerstream.checkpoint.folder import open_folder
from layerstream.checkpoint.selection import Selection, select_files
from layerstream.errors import CheckpointError, CheckpointNotFound, InvalidHeader, UnsupportedFormat
from safetensors.torch import save_file

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([ONE], Selection((ONE,))),
        ([ONE, "._model.safetensors", ".hidden.safetensors"], Selection((ONE,))),
        ([ONE, INDEX, *SHARDS], Selection((ONE,), left_out=(INDEX, *SHARDS))),
        ([ONE, "model.fp16.safetensors"], Selection((ONE,), left_out=("model.fp16.safetensors",))),
        ([ONE, "consolidated.safetensors"], Selection((ONE,))),
        ([ONE, "adapter_config.json"], Selection((ONE,), adapter=True)),
        ([ONE, "adapter_model.safetensors"], Selection((ONE,), adapter=True)),
        ([ONE, "adapter_model.bin"], Selection((ONE,), adapter=True)),
        ([INDEX, *SHARDS], Selection(index=INDEX)),
        ([INDEX, *SHARDS, "another.safetensors"], Selection(index=INDEX)),
        ([INDEX, "a.safetensors.index.json"], Selection(index=INDEX)),
        (["a.safetensors.index.json", *SHARDS], Selection(index="a.safetensors.index.json")),
        ([INDEX, "consolidated.safetensors.index.json"], Selection(index=INDEX)),
        ([INDEX, "._model.safetensors.index.json"], Selection(index=INDEX)),
        (SHARDS, Selection(tuple(SHARDS))),
        (["._" + SHARDS[0], *SHARDS], Selection(tuple(SHARDS))),
        (["b.safetensors", "a.safetensors", "optimizer.safetensors"], Selection(("a.safetensors", "b.safetensors"))),
        (["consolidated.safetensors"], Selection(("consolidated.safetensors",))),
        (["a.safetensors", "pytorch_model.bin"], Selection(("a.safetensors",))),
    ],
)
def test_what_is_taken(names: list[str], expected: Selection) -> None:
    assert select_files(Path("m"), names) == expected
    assert select_files(Path("m"), reversed(names)) == expected, "whatever the order"


def test_a_file_that_the_config_names_comes_first() -> None:
    assert select_files(Path("m"), [ONE, "other.safetensors"], "other.safetensors").files == ("other.safetensors",)
    assert select_files(Path("m"), [ONE, "b.safetensors.index.json"], "b.safetensors.index.json").index is not None
    assert select_files(Path("m"), [ONE], "../x.safetensors").files == (ONE,)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ([], CheckpointNotFound, "found: nothing"),
        (["._model.safetensors"], CheckpointNotFound, r"no \*\.safetensors"),
        (SHARDS[:1], CheckpointNotFound, "model-00002-of-00002.safetensors is missing"),
        ([*SHARDS, "model-00001-of-00001.safetensors"], InvalidHeader, "keep one set"),
        ([*SHARDS, "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"], InvalidHeader, "keep one set"),
        (["model.bin"], UnsupportedFormat, "pickles"),
        (["adapter_model.safetensors", "adapter_config.json"], UnsupportedFormat, "merge_and_unload"),
        (["adapter_config.json", "config.json"], UnsupportedFormat, "only an adapter"),
        (["x.gguf"], CheckpointNotFound, "pass one of them"),
    ],
)
def test_what_is_refused(names: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        select_files(Path("m"), names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_beside_old_shards_is_the_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in SHARDS:
        save_file({"a": torch.zeros(4)}, folder / name)
    write_index(folder, {"a": SHARDS[0]})
    save_file({"a": torch.ones(5)}, folder / ONE)
    with caplog.at_level(logging.WARNING):
        assert open_folder(folder).tensors["a"].shape == (5,)
    assert "model-00001-of-00002.safetensors" in caplog.text
    (folder / SHARDS[0]).unlink()
    assert open_folder(folder).tensors["a"].shape == (5,), "whatever the old index names"


@pytest.mark.parametrize("decides", [0, 1])
def test_of_a_tensor_in_two_shards_the_index_decides(folder: Path, decides: int) -> None:
    for number, name in enumerate(SHARDS):
        save_file({"a": torch.zeros(4 + number), f"b{number}": torch.zeros(1)}, folder / name)
    write_index(folder, {"b0": SHARDS[0], "b1": SHARDS[1], "a": SHARDS[decides]})
    assert open_folder(folder).tensors["a"].shape == (4 + decides,)
    write_index(folder, {"b0": SHARDS[0], "b1": SHARDS[1]})
    with pytest.raises(InvalidHeader, match="no index says which counts"):
        open_folder(folder)


def test_an_index_that_is_wrong_about_a_tensor_does_not_hide_it(folder: Path) -> None:
    save_file({"a": torch.zeros(4)}, folder / SHARDS[0])
    save_file({"b": torch.zeros(4)}, folder / SHARDS[1])
    write_index(folder, {"a": SHARDS[1], "b": SHARDS[0], "nobody": SHARDS[0]})
    assert sorted(open_folder(folder).tensors) == ["a", "b"]


def test_an_adapter_beside_the_model_is_said_not_to_count(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.zeros(4)}, folder / ONE)
    (folder / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        open_folder(folder)
    assert "an adapter lies beside the model and is not applied" in caplog.text


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_is_said_to_be_one(folder: Path, with_config: bool) -> None:
    save_file({"a": torch.zeros(4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(UnsupportedFormat, match="only an adapter"):
        open_folder(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", [ONE, "config.json", INDEX])
def test_what_git_lfs_left_is_said_to_be_that(folder: Path, name: str) -> None:
    if name != ONE:
        save_file({"a": torch.zeros(4)}, folder / "part.safetensors")
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointNotFound, match="git lfs pull"):
        open_folder(folder)


@pytest.mark.parametrize("name", [ONE, "config.json", INDEX, SHARDS[1]])
def test_a_link_that_leads_nowhere_is_said_to_be_one(folder: Path, name: str) -> None:
    save_file({"a": torch.zeros(4)}, folder / SHARDS[0])
    if name == SHARDS[1]:
        write_index(folder, {"a": SHARDS[0], "b": SHARDS[1]})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointNotFound, match=r"is a link to .*gone, which is not there"):
        open_folder(folder)


def test_files_of_macos_are_not_read(folder: Path) -> None:
    save_file({"a": torch.zeros(4)}, folder / "part.safetensors")
    (folder / "._part.safetensors").write_bytes(struct.pack(">I", 0x00051607) + bytes(100))
    (folder / "._model.safetensors.index.json").write_bytes(bytes(100))
    assert sorted(open_folder(folder).tensors) == ["a"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".", "..", "a\0b", "", "a/b"])
@pytest.mark.parametrize("is_followed", [False, True])
def test_an_index_leads_nowhere_else(folder: Path, name: str, is_followed: bool) -> None:
    save_file({"a": torch.zeros(4)}, folder / ("x.safetensors" if is_followed else ONE))
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="not the name of a file"):
        open_folder(folder)
