"""GGUF files stream as they lie: logits and greedy tokens of plain transformers with the same weights, fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from layerstream import LayerStream, SamplingParams
from layerstream.checkpoint.codecs.ggml import SUPPORTED, Ggml
from layerstream.checkpoint.gguf import GgufFile, open_gguf
from layerstream.checkpoint.gguf_config import read_gguf_config
from layerstream.checkpoint.gguf_names import resolve_gguf
from layerstream.comparing.weights import GgufWeights
from layerstream.errors import CheckpointNotFound, InvalidHeader, TruncatedFile, UnsupportedFormat, UnsupportedModel
from layerstream.text.tokenizer import load_tokenizer

from tests.crossing import by_turns
from tests.gguf_files import Kind, draw_blocks, write_gguf
from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import YARN as _YARN
from tests.models import make_model, make_tokenizer

TOLERANCE = 1e-4  # of the largest logit
NAMED = "F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
_BLOCKS = {"moe_intermediate_size": 64}  # of 32 values, whole in every row
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # of a family in tests/models/, with other sizes
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


@pytest.mark.parametrize(
    ("kind", "mode"),
    by_turns(["F16", "Q4_0", "Q8_0", "Q5_1"], ("cut", "device-host"), ("resident", "tight", "layers")),
)
def test_equals_the_decoded_weights(kind: str, mode: str, tmp_path: Path) -> None:
    _compare(tmp_path, "llama", kind, mode)


STREAMED = ["llama3-rope", "mixtral", "gemma2", "qwen3-moe", "glm4-moe", "deepseek-v3", "gpt-oss", "llama4-text"]


@pytest.mark.parametrize("family", STREAMED)
def test_what_is_undone_is_so_in_slices_and_experts_too(family: str, tmp_path: Path) -> None:
    _compare(tmp_path, family, "Q8_0", "layers")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_architectures(family: str, tmp_path: Path) -> None:
    architecture, sizes = ARCHITECTURES[family]
    layers = 6 if "window" in family or architecture in {"gemma2", "gemma3", "exaone4", "cohere2"} else 4
    reference = make_model(family, tmp_path / "plain", sizes={"num_hidden_layers": layers, **sizes})
    _check_reading(tmp_path, reference, architecture)


_SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
_GEMMA4 = {
    "vocab_size_per_layer_input": 320, "global_head_dim": 32, "sliding_window": 40, "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip
_BOTH = {"mscale": 0.7, "mscale_all_dim": 0.7}
_FACTORS = {"short_factor": [1.0 + at / 8 for at in range(8)], "long_factor": [2.0 + at for at in range(8)]}
_LOCAL = {"rope_type": "default", "rope_theta": 1e4}
READ: dict[str, tuple[str, str, dict[str, Any]]] = {  # an architecture, a family, and its config
    "gemma4 with experts": (
        "gemma4",
        "Gemma4Text",
        _GEMMA4
        | {"attention_k_eq_v": True, "num_experts": 4, "num_global_key_value_heads": 1, "enable_moe_block": True}
        | {"top_k_experts": 2, "moe_intermediate_size": 64, "final_logit_softcapping": 30.0},
    ),
    "gemma4 with inputs of layers": (
        "gemma4",
        "Gemma4Text",
        _GEMMA4
        | {"num_hidden_layers": 12, "hidden_size_per_layer_input": 32}
        | {"num_kv_shared_layers": 5, "use_double_wide_mlp": True},
    ),
    "linear": (
        "gemma3",
        "Gemma3Text",
        {"sliding_window": 40, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}
        | {
            "rope_parameters": {
                "sliding_attention": _LOCAL,
                "full_attention": {**_LOCAL, "rope_type": "linear", "factor": 8.0},
            }
        },
    ),
    "longrope": (
        "phi3",
        "Phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256}
            | _FACTORS,
            "original_max_position_embeddings": 256,
        },
    ),
    "yarn in full layers": (
        "olmo2",
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": 40, "layer_types": 3 * ["sliding_attention"] + ["full_attention"]}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
                "full_attention": {**_YARN, "rope_theta": 12345.0},
            }
        },
    ),
    "yarn over latents": ("deepseek2", "DeepseekV3", _LATENT | {"rope_parameters": {**_YARN, **_BOTH}}),
    "deepseek_v2": ("deepseek2", "DeepseekV2", _LATENT | {"topk_method": "group_limited_greedy"}),
    "ministral3": (
        "mistral3",
        "Ministral3",
        {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_metadata_say_beside_sizes(case: str, tmp_path: Path) -> None:
    architecture, reference = _draw(case)
    _check_reading(tmp_path, reference, architecture)


@pytest.mark.parametrize("case", ["gemma4 with experts", "gemma4 with inputs of layers"])
def test_gemma_4_streams(case: str, tmp_path: Path) -> None:
    architecture, reference = _draw(case)
    _run(tmp_path / "model.gguf", reference, architecture, "Q8_0", "layers")


def _draw(case: str) -> tuple[str, Any]:
    """Architecture and random model of one of :data:`READ`."""
    architecture, family, changes = READ[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **changes})
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape) * 0.2 + (1.0 if "layer_scalar" in name else 0.0))
    return architecture, reference


def _check_reading(folder: Path, reference: Any, architecture: str) -> None:
    """transformers' model of the config that is read, with the weights that are read, computes what *reference* does
    with what was written."""
    write_gguf(folder / "model.gguf", reference, architecture, Kind.Q8_0)
    file = open_gguf(folder / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_config(read_gguf_config(file), attn_implementation="eager").eval()
    sources = resolve_gguf(model, file)
    model.load_state_dict(GgufWeights(sources).read(sources))
    prompt = torch.tensor([draw_prompt(70)])
    with torch.inference_mode():
        expected = reference(prompt).logits
        assert (model(prompt).logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture
def plain_file(tmp_path: Path) -> GgufFile:
    write_gguf(tmp_path / "m.gguf", make_model("llama", tmp_path / "plain"), "llama", Kind.Q8_0)
    return open_gguf(tmp_path / "m.gguf")


def test_a_tensor_without_a_place_is_named(plain_file: GgufFile) -> None:
    """Blocks that predict further tokens are left out; anything else would be another model."""
    model = transformers.AutoModelForCausalLM.from_config(read_gguf_config(plain_file))
    tensor = plain_file.tensors["output_norm.weight"]
    counted = plain_file.metadata | {"llama.block_count": 4, "llama.nextn_predict_layers": 1}
    further = replace(plain_file, metadata=counted, tensors={**plain_file.tensors, "blk.3.nextn.enorm.weight": tensor})
    assert resolve_gguf(model, further).keys() == model.state_dict().keys()
    strange = replace(plain_file, tensors={**plain_file.tensors, "blk.0.attn_sinks.weight": tensor})
    with pytest.raises(
        UnsupportedFormat, match=r"has 'blk.0.attn_sinks.weight' and 0 more tensors that 'llama' models"
    ):
        resolve_gguf(model, strange)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"llama.block_count": None}, InvalidHeader, "have no llama.block_count"),
        ({"llama.embedding_length": None}, InvalidHeader, "say embedding_length is None"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, r"scaled \(yarn\), and its metadata do not say all"),
        ({"llama.attention.temperature_scale": 0.1}, UnsupportedModel, "temperature_scale is 0.1, which is not read"),
        ({"llama.rope.dimension_sections": [8, 4, 4, 0]}, UnsupportedModel, "dimension_sections"),
        ({"general.architecture": "bert"}, UnsupportedModel, "'bert': it is no decoder"),
        ({"general.architecture": "plm"}, UnsupportedModel, "'plm': what its converter made of weights"),
    ],
)
def test_metadata_that_make_no_model_are_an_error(
    said: dict[str, Any], error: type[Exception], message: str, plain_file: GgufFile
) -> None:
    metadata = {name: value for name, value in (plain_file.metadata | said).items() if value is not None}
    with pytest.raises(error, match=message):
        read_gguf_config(replace(plain_file, metadata=metadata))


def test_text_is_split_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    reference = make_model("llama", tmp_path / "plain")
    for name in ("glm4", "nobody's"):
        write_gguf(tmp_path / f"{name}.gguf", reference, "llama", Kind.Q8_0, tokenizer, pre=name)
    backend = load_tokenizer(tmp_path / "glm4.gguf").backend_tokenizer
    assert [part for part, _ in backend.pre_tokenizer.pre_tokenize_str("it's 12345")] == ["it", "'s", "Ġ", "123", "45"]
    with pytest.raises(UnsupportedFormat, match=r"splits text is called \"nobody's\".*put the model's tokenizer.json"):
        load_tokenizer(tmp_path / "nobody's.gguf")


def _compare(folder: Path, family: str, kind: str, mode: str) -> None:
    architecture, sizes = ARCHITECTURES[family]
    reference = make_model(family, folder / "plain", sizes={"num_hidden_layers": 6, **sizes})
    _run(folder / "model.gguf", reference, architecture, kind, mode)


def _run(path: Path, reference: Any, architecture: str, kind: str, mode: str) -> None:
    """The engine answers from what was written of *reference* as that does."""
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
        read_gguf_config(open_gguf(tmp_path / "a.gguf"))


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
