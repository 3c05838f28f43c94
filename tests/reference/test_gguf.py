"""GGUF files stream as they lie: logits and greedy tokens of plain transformers with the same weights, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.checkpoint.codecs.ggml import SUPPORTED, Ggml
from layerstream.checkpoint.gguf import open_gguf
from layerstream.errors import CheckpointNotFound, InvalidHeader, TruncatedFile, UnsupportedFormat, UnsupportedModel

from tests.gguf_files import Kind, draw_blocks, write_gguf
from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import YARN as _YARN
from tests.models import make_model, make_tokenizer

TOLERANCE = 1e-4  # of the largest logit
NAMED = "F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
_BLOCKS = {"moe_intermediate_size": 64}  # of 32 values, whole in every row
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # of a family in tests/models.py, with other sizes
    "llama": ("llama", {}),
    "llama-tied": ("llama", {}),
    "llama3-rope": ("llama", {}),
    "mixtral": ("llama", {}),
    "mistral-window": ("mistral3", {"sliding_window": None}),
    "llama4-text": ("llama4", {"attention_chunk_size": 8192, "floor_scale": 8192}),
    "arcee": ("arcee", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "granite": ("granite", {"attention_multiplier": 0.3}),
    "granite-moe": ("granitemoe", {"attention_multiplier": 0.3}),
    "qwen2": ("qwen2", {}),
    "qwen2-moe": ("qwen2moe", _BLOCKS | {"shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3moe", _BLOCKS | {"norm_topk_prob": True}),
    "seed-oss": ("seed_oss", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "phi": ("phi2", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4moe", _BLOCKS | {"use_qk_norm": True, "attention_bias": True}),
    "deepseek-v3": ("deepseek2", _BLOCKS | {"qk_nope_head_dim": 32, "kv_lora_rank": 32, "v_head_dim": 32}),
    "gpt-oss": ("gpt-oss", {"rope_parameters": {**_YARN, "truncate": False}}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo2", {}),
    "olmoe": ("olmoe", {}),
    "cohere": ("command-r", {}),
    "cohere2": ("cohere2", {}),
    "ernie4.5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}


@pytest.mark.parametrize("name", NAMED)
def test_blocks_are_what_the_gguf_package_says(name: str) -> None:
    kind = Kind[name]
    assert kind in SUPPORTED
    stored = draw_blocks(kind, 6, 512, seed=1)
    expected = gguf.quants.dequantize(stored, kind).astype(np.float32)
    out = torch.empty(6, 512)
    codec = Ggml(kind)
    assert codec.expected(6, 512) == {"weight": stored.shape}
    codec.decode({"weight": torch.from_numpy(stored)}, 0, out)
    assert np.array_equal(out.numpy(), expected.reshape(6, 512))
    arranged = torch.empty(6, 512)
    codec.decode_arranged({"weight": torch.from_numpy(stored)}, 0, arranged)
    assert torch.equal(arranged, codec.arranged(out)), "the same values, in an order of its own"


@pytest.mark.parametrize("mode", ["resident", "tight", "layers", "cut", "device-host"])
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0", "Q5_1"])
def test_equals_the_decoded_weights(kind: str, mode: str, tmp_path: Path) -> None:
    _compare(tmp_path, "llama", kind, mode)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_architectures(family: str, tmp_path: Path) -> None:
    _compare(tmp_path, family, "Q8_0", "layers")


def _compare(folder: Path, family: str, kind: str, mode: str) -> None:
    architecture, sizes = ARCHITECTURES[family]
    reference = make_model(family, folder / "plain", sizes={"num_hidden_layers": 6, **sizes})
    path = folder / "model.gguf"
    write_gguf(path, reference, architecture, Kind[kind], make_tokenizer())
    prompts = [draw_prompt(length) for length in (70, 5)]
    run = run_greedily(config_for(path, mode), prompts)
    assert run.streams == (mode in STREAMING)
    assert_equals(run, reference, prompts, TOLERANCE)


def test_an_engine_on_a_file(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    write_gguf(tmp_path / "model.gguf", make_model("llama", tmp_path / "plain"), "llama", Kind.Q4_0, tokenizer)
    with LayerStream(tmp_path / "model.gguf", progress=False) as engine:
        text = "The lazy dog sleeps."
        assert engine.encode(text)[-4:] == tokenizer(text)["input_ids"][-4:]
        assert engine.has_chat_template == bool(tokenizer.chat_template)
        completion = engine.generate(text, SamplingParams(max_tokens=5, ignore_eos=True))[0]
        assert completion.usage.completion_tokens == 5


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("llama", tmp_path / "plain"), "llama", Kind.Q4_0)
    whole = path.read_bytes()
    for size in (0, 3, 20, 200, 2000, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises((InvalidHeader, TruncatedFile), match=r"model\.gguf"):
            open_gguf(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="'mamba': it keeps recurrent state"):
        open_gguf(tmp_path / "a.gguf")


def test_missing_splits_are_named(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointNotFound, match=r"m-00002-of-00003.gguf, m-00003-of-00003.gguf missing, of 3"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_folder_of_files_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointNotFound, match=r"pass one of them as the model: a-Q4_K_M.gguf"):
        LayerStream(tmp_path)


def test_without_a_tokenizer_in_the_file_one_beside_it_is_taken(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("llama", tmp_path / "plain"), "llama", Kind.Q4_0)
    with pytest.raises(UnsupportedFormat, match=r"no tokenizer .* put the model's tokenizer\.json beside it"):
        LayerStream(path, progress=False)
    add_tokenizer(tmp_path, tokenizer_folder)
    with LayerStream(path, progress=False) as engine:
        assert engine.generate("a b", SamplingParams(max_tokens=2, ignore_eos=True))[0].usage.completion_tokens == 2
        assert engine.stats().bits_per_weight == pytest.approx(4.5, abs=0.3)
        assert engine.stats().bytes_per_sweep == engine.plan.streamed_bytes
