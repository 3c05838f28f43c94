"""Models that are right are called the same; a fault that is put in is found in its layer, and by its module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layerstream.comparing import answering, comparison
from layerstream.comparing.comparison import Comparison, compare
from layerstream.comparing.judging import Culprit
from layerstream.comparing.plain import PlainModel
from layerstream.errors import ConfigurationError, PromptTooLong, StorageFull, UnsupportedModel
from layerstream.model import trace
from layerstream.model.asked_masks import Asked, Locality, locality
from layerstream.planner import on_host
from layerstream.setup.config import EngineConfig
from layerstream.store.config import KVStoreConfig
from safetensors.torch import load_file, save_file

from tests.gguf_files import Kind, write_gguf
from tests.harness import add_tokenizer, config_for, draw_prompt
from tests.models import make_model, make_tokenizer
from tests.pretend import PretendCuda
from tests.quantised import PACKERS, write_quantised

PROMPT = draw_prompt(70)
"""Several chunks, and longer than any window."""

Break = Callable[[Any], None]
"""Puts a fault into the engine's modules."""


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Callable[[str], Path]:
    """Writes a small model of a family."""

    def write(family: str) -> Path:
        make_model(family, tmp_path)
        add_tokenizer(tmp_path, tokenizer_folder)
        return tmp_path

    return write


def run(folder: Path, mode: str = "resident", dtype: str = "float32") -> Comparison:
    return compare(config_for(folder, mode, dtype), PROMPT, 3)


def broken(folder: Path, monkeypatch: pytest.MonkeyPatch, break_: Break, mode: str = "resident") -> Comparison:
    """The comparison of an engine that *break_* was let at."""
    assemble = comparison.assemble

    def spoil(*args: Any) -> Any:
        parts = assemble(*args)
        break_(parts.skeleton.model)
        return parts

    monkeypatch.setattr(comparison, "assemble", spoil)
    return run(folder, mode)


def other_file(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """The file has another *name* than the engine read: it has a wrong weight."""

    def rewrite(_: Any) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "new", {"format": "pt"})
        os.replace(folder / "new", folder / "model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    [
        ("llama-tied", "cut", "float32"),
        ("gemma2", "layers", "float32"),
        ("olmo", "resident", "float32"),
        ("gpt-oss", "layers", "float32"),
        ("deepseek-v3", "layers", "float32"),
        ("llama4-text", "layers", "float32"),
        ("phi3-window", "layers", "float16"),
        ("qwen3-moe", "layers", "bfloat16"),
    ],
)
def test_what_is_right_is_the_same(family: str, mode: str, dtype: str, make: Callable[[str], Path]) -> None:
    found = run(make(family), mode, dtype)
    assert found.outcome in ({"same"} if dtype == "float32" else {"same", "tie"})
    assert found.culprit is None
    assert max(item.excess for item in found.findings) < 0.5
    assert [choice.position for choice in found.choices] == [len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 2]


def test_experts_that_come_as_they_are_routed_to(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "_resident_plan", lambda *_, **__: None)
    assert run(make("qwen2-moe"), "layers").outcome == "same"


def test_on_a_device(make: Callable[[str], Path], pretended_cuda: PretendCuda) -> None:
    assert run(make("llama"), "device-host").outcome == "same"


@pytest.mark.parametrize("kind", ["gptq", "fp8"])
def test_quantised_weights_are_what_the_codec_says(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    pack, quantisation = PACKERS[kind]
    write_quantised(tmp_path, make_model("llama", tmp_path), pack, quantisation, leave="layers.1.mlp.up_proj")
    add_tokenizer(tmp_path, tokenizer_folder)
    assert run(tmp_path, "layers").outcome == "same"


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"num_hidden_layers": 6}
    write_gguf(path, make_model("llama3-rope", tmp_path, sizes=sizes), "llama", Kind.Q8_0, make_tokenizer())
    assert run(path, "layers").outcome == "same"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj"),
        ("model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn.k_proj"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_wrong_weight(name: str, module: str, make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("llama")
    found = broken(folder, monkeypatch, other_file(folder, name, lambda weight: weight * 1.01))
    assert found.outcome == "different"
    assert found.first is not None
    assert module.startswith(found.first.module) or found.first.module == "logits"
    assert found.culprit == Culprit(module)
    assert [finding.agrees for finding in found.findings].count(False) == 1, "the layers above are right in themselves"


def test_one_wrong_row_of_a_matrix(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("gemma2")

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[7] = 0.0
        return weight

    found = broken(folder, monkeypatch, other_file(folder, "model.layers.1.mlp.up_proj.weight", change))
    assert found.culprit == Culprit("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("mode", ["resident", "cut"])
def test_a_wrong_scale_of_attention(mode: str, make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def break_(model: Any) -> None:
        model.model.layers[1].self_attn.scaling *= 1.5

    found = broken(make("llama"), monkeypatch, break_, mode)
    assert found.first is not None
    assert found.first.module == "model.layers.1"
    path = "model.layers.1.self_attn"
    assert found.culprit == Culprit(path, between=(f"{path}.v_proj", f"{path}.o_proj"))


def test_a_window_that_is_too_wide(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens past the window differ, from the first layer on that has one."""

    def wider(family: str, asked: Asked) -> Locality:
        window, chunk = locality(family, asked)
        return (60 if window == 40 else window), chunk

    monkeypatch.setattr(trace, "locality", wider)
    found = broken(make("qwen2-window"), monkeypatch, lambda model: None, "layers")
    assert found.culprit is not None
    assert found.culprit.path == "model.layers.1.self_attn"
    assert found.first is not None
    assert found.first.position >= 40


def test_a_wrong_expert(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("qwen3-moe")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    found = broken(folder, monkeypatch, other_file(folder, name, lambda weight: weight * 1.1))
    assert found.culprit == Culprit("model.layers.1.mlp.experts", experts=(3,))


def test_a_wrong_router(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("mixtral")
    (name,) = (key for key in load_file(folder / "model.safetensors") if "layers.2." in key and "gate.weight" in key)
    found = broken(folder, monkeypatch, other_file(folder, name, lambda weight: -weight))
    assert found.culprit == Culprit("model.layers.2.mlp.gate")


def test_a_bias_that_only_chooses_experts(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's correction is in no weight, and so in no number that comes out of its router."""
    folder = make("deepseek-v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    found = broken(folder, monkeypatch, other_file(folder, name, torch.zeros_like))
    assert found.first is not None
    assert found.first.module == "model.layers.1"
    assert found.culprit is not None
    assert found.culprit.path == "model.layers.1.mlp.gate"


def test_wrong_experts_with_the_right_weights(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is wrong: rows are sent to the neighbours of their experts."""

    def break_(model: Any) -> None:
        router = model.model.layers[1].mlp.gate
        right = router.forward

        def shifted(hidden: torch.Tensor) -> Any:
            logits, weights, index = right(hidden)
            return logits, weights, (index + 1) % logits.shape[1]

        router.forward = shifted

    found = broken(make("mixtral"), monkeypatch, break_)
    assert found.first is not None
    assert found.first.num_misrouted > 0
    assert found.culprit == Culprit("model.layers.1.mlp")


def test_a_fault_that_is_not_there_again(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    step, answers = answering.step_greedily, []

    def first_wrong(parts: Any, *args: Any) -> Any:
        module = parts.skeleton.model.model.layers[1].mlp
        right = module.forward
        if not answers:
            module.forward = lambda hidden: right(hidden) * 1.1
        answers.append(step(parts, *args))
        module.forward = right
        return answers[-1]

    monkeypatch.setattr(answering, "step_greedily", first_wrong)
    found = run(make("llama"))
    assert found.first is not None
    assert found.first.module == "model.layers.1"
    assert found.outcome == "different"
    assert found.culprit is None


def test_what_cannot_be_compared_says_why(make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("llama")
    config = config_for(folder, "resident")
    with pytest.raises(ConfigurationError, match="leave out kv_store"):
        compare(EngineConfig(str(folder), kv_store=KVStoreConfig(folder / "kv")), PROMPT, 3)
    with pytest.raises(PromptTooLong, match="the context has"):
        compare(config, PROMPT, 5000)
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "available_memory_bytes", lambda: 1000)
        with pytest.raises(ConfigurationError, match="compare a shorter prompt"):
            compare(config, PROMPT, 3)
    with monkeypatch.context() as patch:
        patch.setattr(comparison.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(StorageFull, match="1000 B free: compare a shorter prompt, or have TMPDIR"):
            compare(config, PROMPT, 3)
    monkeypatch.setattr(PlainModel, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(UnsupportedModel, match="does not run this 'llama', so there is nothing"):
        compare(config, PROMPT, 3)
