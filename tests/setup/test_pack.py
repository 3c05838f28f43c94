"""Packing: what comes out is what its owners load, a kill loses nothing, and nothing half-written is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from layerstream import LayerStream, SamplingParams
from layerstream.api.events import Event, PackProgress
from layerstream.comparing.weights import GgufWeights
from layerstream.errors import (
    CheckpointNotFound,
    ConfigurationError,
    InvalidHeader,
    ReadError,
    StorageFull,
    TruncatedFile,
    UnsupportedFormat,
)
from layerstream.model.skeleton import build_skeleton
from layerstream.setup import pack as packing
from layerstream.setup import pack_items
from layerstream.setup.pack import pack
from typer.testing import CliRunner

from benchmarks.accuracy import decoded
from tests.gguf_files import Kind, write_gguf
from tests.harness import add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import YARN, make_model, make_tokenizer
from tests.programs import Program

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
KINDS = ["nf4", "int8", "int4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_model("llama", folder, sizes=SIZES)
    add_tokenizer(folder, tokenizer_folder)
    return folder


@pytest.mark.parametrize("keep_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs_what_was_packed(kind: str, keep_head: bool, source: Path, tmp_path: Path) -> None:
    report = pack(source, tmp_path / "out", kind, keep_head=keep_head)
    matrices = decoded(tmp_path / "out")
    assert len(matrices) == 3 * 7 + (not keep_head)
    assert report.packed_bytes < 0.6 * report.source_bytes
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    original = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    with torch.no_grad():
        for name, matrix in matrices.items():
            error = (matrix - original[name]).square().mean().sqrt() / original[name].square().mean().sqrt()
            assert error < {"nf4": 0.11, "int8": 0.015, "int4": 0.13}[kind]
            reference.get_parameter(name).copy_(matrix)
    prompt = draw_prompt(40)
    for mode in ("resident", "layers"):
        run = run_greedily(config_for(tmp_path / "out", mode), [prompt])
        tokens = run.tokens[0]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (run.logits[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_plain_transformers_loads_it_as_its_own(kind: str, source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", kind, keep_head=True)
    options = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    )
    own = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    num_compared = 0
    for name, module in own.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            other = loaded.get_submodule(name)
            assert type(other) is type(module)
            assert torch.equal(module.weight.data.view(-1), other.weight.data.view(-1))
            if kind == "nf4":
                values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                others = bnb.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
                assert torch.equal(values.float(), others.float())
            num_compared += 1
    assert num_compared == 21
    prompt = torch.tensor([draw_prompt(20)])
    with torch.inference_mode():
        assert torch.equal(own(prompt).logits.argmax(-1), loaded(prompt).logits.argmax(-1))


def test_large_matrices_are_packed_in_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(source, tmp_path / "whole", "nf4")
    pack(source, tmp_path / "whole4", "int4")
    monkeypatch.setattr(pack_items, "PART_BYTES", 1)
    pack(source, tmp_path / "parts", "nf4")
    pack(source, tmp_path / "parts4", "int4")
    for whole, parts in (("whole", "parts"), ("whole4", "parts4")):
        for path in sorted((tmp_path / whole).glob("*.safetensors")):
            assert path.read_bytes() == (tmp_path / parts / path.name).read_bytes()


KILLED = """
import sys, time
from pathlib import Path
from layerstream.setup.pack import pack
def slowly(done, count, num_bytes):
    print(done, flush=True)
    time.sleep(0.3)
pack(Path(sys.argv[1]), Path(sys.argv[2]), "nf4", on_shard=slowly)
"""


def test_a_kill_loses_no_finished_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = Program(KILLED, source, out)
    while int(child.stdout.readline()) < 2:
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.finish()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(there) >= 2
    with pytest.raises(CheckpointNotFound, match=r"no config\.json"):
        build_skeleton(out)
    report = pack(source, out, "nf4")
    assert report.num_kept == len(there)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    pack(source, tmp_path / "other", "nf4")
    for path in (tmp_path / "other").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_what_cannot_be_packed_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="expected one of 'nf4', 'int8', 'int4'"):
        pack(source, tmp_path / "a", "int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty"):
        pack(source, tmp_path / "full", "nf4")
    with pytest.raises(ConfigurationError, match="the source itself"):
        pack(source, source, "nf4")
    pack(source, tmp_path / "packed", "nf4")
    with pytest.raises(ConfigurationError, match="quantised already"):
        pack(tmp_path / "packed", tmp_path / "again", "nf4")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(StorageFull, match=r"are needed and 1000 B are free"):
        pack(source, tmp_path / "b", "nf4")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["pack.json"]


def test_a_changed_source_is_not_mixed_with_the_old_one(source: Path, tmp_path: Path) -> None:
    changing = tmp_path / "source"
    shutil.copytree(source, changing)

    def stop(done: int, count: int, num_bytes: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(changing, tmp_path / "out", "nf4", on_shard=stop)
    with pytest.raises(ConfigurationError, match="of another kind"):
        pack(changing, tmp_path / "out", "int8")
    time.sleep(0.01)
    (changing / "model.safetensors").touch()
    with pytest.raises(ConfigurationError, match="of another source"):
        pack(changing, tmp_path / "out", "nf4")


@pytest.mark.parametrize("when", [1, 3, "last"])
def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path, when: int | str) -> None:
    """At every moment: else shards of two models would lie side by side."""
    changing, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, changing)

    def change(done: int, count: int, num_bytes: int) -> None:
        if done == (count if when == "last" else when):
            os.utime(changing / "model.safetensors", ns=(1, 1))

    with pytest.raises(ConfigurationError, match=r"was changed while it was packed.*delete that folder"):
        pack(changing, out, "int8", on_shard=change)
    assert not (out / "config.json").exists()
    with pytest.raises(ConfigurationError, match="of another source"):
        pack(changing, out, "int8")


def test_what_is_found_by_its_identity_is_packed_of_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="was changed"):
        pack(source, tmp_path / "out", "int8", identity=[["model.safetensors", 1, 1]])


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.EROFS, ConfigurationError, "cannot be written .*; pack into another folder"),
        (errno.ENOSPC, StorageFull, "the disk is full"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "note", "shard", "config"])
def test_a_disk_that_cannot_be_written_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], words: str,
    where: str,
) -> None:  # fmt: skip
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "out"))

    original = packing.write_whole
    if where == "folder":
        monkeypatch.setattr(Path, "mkdir", failing)
    elif where == "shard":
        monkeypatch.setattr(packing, "_write", failing)
    else:
        name = {"note": packing.JOB, "config": "config.json"}[where]
        monkeypatch.setattr(packing, "write_whole", lambda p, text: (failing if p.name == name else original)(p, text))
    with pytest.raises(error, match=words):
        pack(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_source_that_cannot_be_read_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda _, size, offset: bytes(size // 2))
    with pytest.raises(TruncatedFile, match=r"model\.safetensors: ends within"):
        pack(source, tmp_path / "short", "int8")

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ReadError, match=r"model\.safetensors: cannot be read"):
        pack(source, tmp_path / "failing", "int8")
    assert not list(tmp_path.glob("*/*.safetensors*"))


GGUF = {  # a family, and what is read of it
    "Q4_0": ("llama", "llama", "Q4_0", {}),
    "Q4_1 with factors": ("llama3-rope", "llama", "Q4_1", {}),
    "norms with an offset": ("gemma2", "gemma2", "Q4_0", {"query_pre_attn_scalar": 32}),
    "experts": ("qwen3-moe", "qwen3moe", "Q4_0", {"moe_intermediate_size": 64, "norm_topk_prob": True}),
    "other blocks": ("llama", "llama", "Q8_0", {}),
    "numbers": ("llama-tied", "llama", "F16", {}),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_file_keeps_its_values(case: str, tmp_path: Path) -> None:
    """Every one of them, bit for bit: in tiles where they have four bits, as blocks else."""
    family, architecture, kind, sizes = GGUF[case]
    reference = make_model(family, tmp_path / "plain", sizes={**SIZES, **sizes})
    write_gguf(tmp_path / "model.gguf", reference, architecture, Kind[kind], make_tokenizer())
    report = pack(tmp_path / "model.gguf", tmp_path / "out", "int4")
    assert report.packed_bytes <= report.source_bytes
    before, after = (build_skeleton(path, dtype="float32") for path in (tmp_path / "model.gguf", tmp_path / "out"))
    values = GgufWeights(before.sources).read(before.sources)
    again = GgufWeights(after.sources).read(after.sources)
    assert values.keys() == again.keys()
    assert all(torch.equal(again[name].float(), values[name].float()) for name in values)
    tiled = [
        name for name, source in after.sources.items() if "int4" in getattr(getattr(source, "codec", 0), "name", "")
    ]
    assert bool(tiled) == kind.startswith("Q4")
    prompt = draw_prompt(40)
    run = run_greedily(config_for(tmp_path / "out", "layers"), [prompt])
    assert_equals(run, reference, [prompt], 1e-4)


def test_a_gguf_file_keeps_its_values_alone_as_int4(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", make_model("llama", tmp_path / "plain"), "llama", Kind.Q4_0)
    with pytest.raises(ConfigurationError, match="is a GGUF file, whose values stay as they are: pack it to int4"):
        pack(tmp_path / "x.gguf", tmp_path / "out", "int8")
    with pytest.raises(CheckpointNotFound, match=r"there is no y\.gguf"):
        pack(tmp_path / "y.gguf", tmp_path / "out", "int4")


def test_experts_that_lie_transposed_are_not_packed(tmp_path: Path) -> None:
    reference = make_model("gpt-oss", tmp_path / "plain", sizes={"rope_parameters": {**YARN, "truncate": False}})
    write_gguf(tmp_path / "x.gguf", reference, "gpt-oss", Kind.MXFP4)
    with pytest.raises(UnsupportedFormat, match="has experts that this file stores transposed"):
        pack(tmp_path / "x.gguf", tmp_path / "out", "int4")


def test_an_adapter_beside_the_source_stays_there(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text("{}")
    pack(tmp_path / "source", tmp_path / "out", "int8")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_damaged_shard_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packing._write

    def damaging(path: Path, items: object) -> None:
        original(path, items)  # type: ignore[arg-type]
        if "00003" in path.name:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
            path.write_bytes(raw)

    monkeypatch.setattr(packing, "_write", damaging)
    with pytest.raises(InvalidHeader, match="differs from the source"):
        pack(source, tmp_path / "out", "int8")
    assert not list((tmp_path / "out").glob("model-00003*"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_command(source: Path, tmp_path: Path) -> None:
    from layerstream.cli import app

    result = CliRunner().invoke(app, ["pack", str(source), str(tmp_path / "out"), "--int8"])
    assert result.exit_code == 0, result.output
    assert "of 1" in result.output or "MiB" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    both = CliRunner().invoke(app, ["pack", str(source), str(tmp_path / "b"), "--int8", "--nf4"])
    assert both.exit_code == 2
    assert "choose one of" in both.output


def test_the_engine_packs_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSTREAM_PACKED", str(tmp_path / "cache"))
    events: list[Event] = []
    answers = []
    for _ in range(2):
        with LayerStream(source, quantization="int8", dtype="float32", progress=events.append) as engine:
            assert engine.model_name == str(source)
            answers.append(engine.generate([draw_prompt(9)], SamplingParams(max_tokens=4, ignore_eos=True, seed=1)))
    assert answers[0][0].token_ids == answers[1][0].token_ids
    packing_events = [event for event in events if isinstance(event, PackProgress)]
    assert [event.done for event in packing_events] == list(range(len(packing_events))), "the second engine found it"
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    with pytest.raises(ConfigurationError, match="expected one of None, 'nf4', 'int8', 'int4'"):
        LayerStream(changed, quantization="q4", progress=False)
