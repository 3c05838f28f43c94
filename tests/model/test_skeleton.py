"""From a folder as people have it to the model that it is: dtypes, ends of answers, and what cannot be one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layerstream.checkpoint.hub import headers_folder
from layerstream.errors import (
    CheckpointError,
    InvalidHeader,
    LayerStreamError,
    MissingTensor,
    UnsupportedFormat,
    UnsupportedModel,
)
from layerstream.model.assumed import assume_weights, has_config_alone
from layerstream.model.skeleton import build_skeleton
from layerstream.text.defaults import load_defaults
from layerstream.text.tokenizer import load_tokenizer
from safetensors.torch import load_file, save_file

from tests.harness import add_tokenizer
from tests.models import make_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_model("llama", folder)
    add_tokenizer(folder, tokenizer_folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder: Path, name: str = "config.json", **said: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**config, **said}.items() if value is not ...}))


def restore(folder: Path, dtypes: dict[str, torch.dtype]) -> None:
    """Store the weights as *dtypes* has them by a part of their name, the first that fits."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        dtype = next(dtype for part, dtype in dtypes.items() if part in name)
        tensors[name] = tensor.to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("said", "stored", "expected"),
    [
        (..., {"": BF16}, BF16),
        (..., {"": F16}, F16),
        (..., {"": F32}, F32),
        (..., {"norm": F32, "": BF16}, BF16),
        (None, {"": BF16}, BF16),
        ("bfloat16", {"": F32}, BF16),
        ("float32", {"": BF16}, F32),
        ("float8_e4m3fn", {"": BF16}, BF16),
    ],
)
def test_the_dtype_is_the_configs_else_the_weights(folder: Path, said: Any, stored: Any, expected: torch.dtype) -> None:
    restore(folder, stored)
    change(folder, dtype=said, torch_dtype=...)
    assert build_skeleton(folder).dtype == expected
    if said in (..., None) and len(stored) == 1:
        assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == expected


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma 3 with eyes."""
    folder = tmp_path_factory.mktemp("seeing")
    text = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).to(BF16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("top", "inner", "expected"),
    [([2, 7], 2, {2, 7}), (None, 5, {5}), (..., [5, 6], {5, 6}), (9, ..., {9}), ([1, 106], 1, {1, 106})],
)
def test_a_multimodal_model_ends_as_its_own_config_says(
    seeing: Path, tmp_path: Path, top: Any, inner: Any, expected: set[int]
) -> None:
    shutil.copytree(seeing, tmp_path, dirs_exist_ok=True)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    text.pop("eos_token_id")
    change(tmp_path, eos_token_id=top, text_config=text if inner is ... else {**text, "eos_token_id": inner})
    found = build_skeleton(tmp_path).config
    nobody = type("Tokenizer", (), {"eos_token_id": None})()
    assert load_defaults(tmp_path, found, nobody).eos_token_ids == expected
    whole = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_model_config(whole).eos_token_id
    assert expected == set(theirs if isinstance(theirs, list) else [theirs])


@pytest.mark.parametrize("where", ["top", "inner", "nowhere"])
def test_a_multimodal_models_dtype_is_taken_from_wherever_it_stands(seeing: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(seeing, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    parts = [config, config["text_config"], config["vision_config"]]
    for part in parts:
        part.pop("dtype", None)
    if where != "nowhere":
        parts[where == "inner"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_skeleton(tmp_path).dtype == BF16


def test_integers_in_place_of_weights_are_not_computed_with(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedFormat, match=r"up_proj.weight' is stored as torch.int8"):
        build_skeleton(folder)


def test_a_template_of_a_processor_is_found(folder: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    change(folder, "tokenizer_config.json", chat_template=...)
    assert load_tokenizer(folder).chat_template is None
    change(folder, "chat_template.json", chat_template="{{ messages[0].content }}!")
    assert load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    change(folder, "chat_template.json", chat_template=["x"])
    with pytest.raises(CheckpointError, match="expected a template"):
        load_tokenizer(folder)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def say(**said: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder, **said)


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return act


DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HOSTILE: dict[str, Callable[[Path], object]] = {
    "unknown family": say(model_type="../../x"),
    "unknown family with code": say(model_type="evil", auto_map={"AutoConfig": "evil.C"}),
    "rope of no kind": say(rope_parameters={"rope_type": "zzz", "rope_theta": 1e4}),
    "rope no object": say(rope_parameters=7),
    "rope theta text": say(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
    "epsilon text": say(rms_norm_eps="x"),
    "activation code": say(hidden_act="__import__('os').system('id')"),
    "dtype unknown": say(dtype="float99"),
    "layer types short": say(layer_types=["full_attention"]),
    "layer types text": say(layer_types="full_attention"),
    "padding outside": say(pad_token_id=10**9),
    "text config list": say(model_type="gemma3", text_config=[1]),
    "quantisation list": say(quantization_config=["x"]),
    "config empty": write("config.json", ""),
    "config deep": write("config.json", DEEP),
    "config digits": write("config.json", '{"model_type":"llama","hidden_size":' + "9" * 5000 + "}"),
    "generation deep": write("generation_config.json", DEEP),
    "generation digits": write("generation_config.json", '{"do_sample":true,"top_k":' + "9" * 5000 + "}"),
    "tokenizer empty": write("tokenizer.json", "{}"),
    "tokenizer deep": write("tokenizer.json", DEEP),
    "tokenizer of git-lfs": write("tokenizer.json", LFS),
    "tokenizer config deep": write("tokenizer_config.json", DEEP),
    "tokenizer config list": write("tokenizer_config.json", "[1]"),
    "tokenizer config class": write("tokenizer_config.json", '{"tokenizer_class": 7}'),
    "tokenizer id": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace('"<s>": 1,', '"<s>": 4000000000,')
    ),
    "config a pipe": in_place_of("config.json", os.mkfifo),
    "weights a pipe": in_place_of("model.safetensors", os.mkfifo),
    "tokenizer a pipe": in_place_of("tokenizer.json", os.mkfifo),
    "template a pipe": in_place_of("chat_template.jinja", os.mkfifo),
    "generation a pipe": in_place_of("generation_config.json", os.mkfifo),
    "vocabulary a device": in_place_of("vocab.json", lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_our_own_errors(folder: Path, name: str) -> None:
    HOSTILE[name](folder)
    with pytest.raises(LayerStreamError) as caught:
        load_defaults(folder, build_skeleton(folder).config, load_tokenizer(folder))
    assert isinstance(caught.value, CheckpointError | UnsupportedModel)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "deepseek-v3", "gemma3", "qwen2-moe"])
def test_a_config_alone_is_weighed_as_its_files_would_be(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, alone = tmp_path / "real", tmp_path / "alone"
    make_model(family, real)
    change(real, dtype="bfloat16")
    restore(real, {"": BF16})
    alone.mkdir()
    shutil.copyfile(real / "config.json", alone / "config.json")
    change(alone, quantization_config={"quant_method": "fp8"})
    assert has_config_alone(alone)
    assert not has_config_alone(real)
    expected, found = build_skeleton(real), build_skeleton(assume_weights(alone))
    assert found.dtype == expected.dtype
    assert (found.body, found.routed, found.head) == (expected.body, expected.routed, expected.head)
    assert found.is_tied == expected.is_tied
    assert headers_folder("x").is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("family", "said", "keeps", "error", "says"),
    [
        ("qwen3_vl", {}, "visual", MissingTensor, "nothing for 36 of 36 parameters"),
        ("qwen3_vl", {"num_hidden_layers": 5}, "", MissingTensor, "layers.3"),
        ("gemma4-text", {"layer_types": ["full_attention"]}, "", CheckpointError, "must be equal to the number of"),
        ("gemma4-text-inputs", {"num_kv_shared_layers": 6}, "", CheckpointError, "layer types producing a cache"),
        ("gemma4-text-inputs", {"hidden_size_per_layer_input": 9}, "", InvalidHeader, r"says \[9, 64\]"),
        ("gemma3", {"sliding_window": 0}, "", UnsupportedModel, "sees 0 positions; expected 1"),
        ("gemma4-text-moe", {"top_k_experts": 99}, "", UnsupportedModel, "k not in range"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_that_of_its_weights(
    family: str, said: dict[str, Any], keeps: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    """A vision-language checkpoint without its text, layers of another number, sizes, windows and experts."""
    make_model(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if keeps in name}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config.get("text_config", config).update(said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says):
        build_skeleton(tmp_path)
