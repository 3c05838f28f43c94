"""Folders as they come: one file, shards, with and without index, and everything that can be wrong with them."""

from __future__ import annotations

import errno
import json
import shutil
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from layerstream.checkpoint import hub
from layerstream.checkpoint.folder import open_folder
from layerstream.errors import (
    CheckpointNotFound,
    GatedRepository,
    InvalidHeader,
    StorageFull,
    UnsupportedFormat,
)
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_of_any_naming_without_an_index(folder: Path) -> None:
    save_file({"a": torch.zeros(4)}, folder / "part-x.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "zz.safetensors")
    checkpoint = open_folder(folder)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.total_bytes == 24


def test_an_index_says_which_files_count(folder: Path) -> None:
    save_file({"a": torch.zeros(4)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    save_file({"a": torch.ones(9)}, folder / "another.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_index(folder, index)
    assert open_folder(folder).tensors["a"].shape == (4,)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"model-00002-of-00002\.safetensors of 2 is missing"):
        open_folder(folder)
    write_index(folder, {"a": "../model-00001-of-00002.safetensors"})
    with pytest.raises(InvalidHeader, match="not the name of a file"):
        open_folder(folder)
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"})
    assert sorted(open_folder(folder).tensors) == ["a"], "'c' is missed by whoever needs it"


def test_the_same_tensor_twice_is_refused(folder: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.zeros(4)}, folder / f"{name}.safetensors")
    with pytest.raises(InvalidHeader, match="also in x"):
        open_folder(folder)


def test_adapters_and_consolidated_copies_are_not_the_model(folder: Path) -> None:
    for name in ("model", "consolidated", "adapter_model"):
        save_file({"a": torch.zeros(4)}, folder / f"{name}.safetensors")
    assert open_folder(folder).tensors["a"].extent.path.name == "model.safetensors"


def test_what_is_not_streamed_is_refused_with_the_reason(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no \*\.safetensors"):
        open_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedFormat, match="pickles"):
        open_folder(folder)
    save_file({"a": torch.zeros(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    with pytest.raises(UnsupportedFormat, match="quantised by 'hqq'"):
        open_folder(folder)
    (folder / "config.json").write_text("{nonsense")
    with pytest.raises(InvalidHeader, match=r"config.json: not JSON"):
        open_folder(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointNotFound, match=r"no config.json; found: nothing"):
        open_folder(empty)


def test_a_thousand_tensors_open_in_under_a_second(folder: Path) -> None:
    for shard in range(20):
        save_file({f"t{shard}.{i}": torch.zeros(8) for i in range(50)}, folder / f"m{shard}.safetensors")
    started = time.perf_counter()
    assert len(open_folder(folder).tensors) == 1000
    assert time.perf_counter() - started < 5  # a hang, not a benchmark: it takes about 10 ms


def test_locate_knows_folders_the_demo_and_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.locate(folder) == folder
    assert hub.locate("demo") == hub.bundled_reader()
    with pytest.raises(CheckpointNotFound, match="no folder here and no hub id"):
        hub.locate("./nowhere")
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.locate("owner/name", revision="main", token="t") == folder
    assert (asked["repo"], asked["revision"], asked["token"]) == ("owner/name", "main", "t")
    assert "*.py" not in asked["allow_patterns"]  # type: ignore[operator]
    hub.locate("owner/name", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (hub_errors.GatedRepoError, GatedRepository, "ask for access at https://huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError, CheckpointNotFound, "no model 'owner/name'"),
        (hub_errors.RevisionNotFoundError, CheckpointNotFound, "at revision 'v1'"),
        (hub_errors.LocalEntryNotFoundError, CheckpointNotFound, "not in the local cache"),
        (hub_errors.OfflineModeIsEnabled, CheckpointNotFound, "HF_HUB_OFFLINE forbids to fetch it"),
        (hub_errors.HTTPError, CheckpointNotFound, "could not be fetched"),
        (OSError, CheckpointNotFound, "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], expected: type[Exception], words: str
) -> None:
    def download(*_: object, **__: object) -> str:
        error = raised.__new__(raised)
        Exception.__init__(error, "no")
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(expected, match=words):
        hub.locate("owner/name", revision="v1")


def test_a_full_disk_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(StorageFull, match="set HF_HOME to a folder elsewhere; what was fetched is kept"):
        hub.locate("owner/name")


def test_a_model_in_the_local_cache_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    save_file({"a": torch.zeros(4)}, snapshot / "model.safetensors")
    real = hub.snapshot_download
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *args, **options: real(*args, cache_dir=tmp_path / "hub", local_files_only=True, **options),
    )
    assert sorted(open_folder(hub.locate("owner/name")).tensors) == ["a"]


def test_a_plan_needs_headers_alone(llama: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the hub, configs and headers are fetched; what they say is what the files themselves say."""
    folder, _ = llama
    fetched: list[dict[str, Any]] = []
    cached = tmp_path / "snapshots" / "abc123"
    cached.mkdir(parents=True)

    def download(repo: str, **options: Any) -> str:
        fetched.append(options)
        for path in folder.glob("*.json"):
            shutil.copyfile(path, cached / path.name)
        return str(cached)

    files = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(dtype=entry["dtype"], shape=entry["shape"], data_offsets=tuple(entry["data_offsets"]))
            for name, entry in header.items()
        }
        files[path.name] = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(
        hub.HfApi, "get_safetensors_metadata", lambda *_, **__: types.SimpleNamespace(files_metadata=files)
    )
    found = hub.locate_headers("owner/name", revision="main")
    assert not any("safetensors" in pattern for options in fetched for pattern in options["allow_patterns"])
    assert not hub.are_weights_here(found)
    assert hub.are_weights_here(folder)
    for path in found.glob("*.safetensors"):
        assert path.stat().st_blocks * 512 < 64 * 1024, "weights take no room"
    entries, expected = open_folder(found).tensors, open_folder(folder).tensors
    assert {name: (e.dtype, e.shape, e.extent.num_bytes) for name, e in entries.items()} == {
        name: (e.dtype, e.shape, e.extent.num_bytes) for name, e in expected.items()
    }
    assert hub.locate_headers(str(folder)) == folder
