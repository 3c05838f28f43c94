"""A model as a peer reads it: an older transformers, llama.cpp."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import random_checkpoint
from benchmarks.peers import write_gguf
from benchmarks.peers.environments import older_copy


def test_the_older_copy_links_what_is_large_and_rewrites_what_has_to_change(tmp_path: Path) -> None:
    model, keep = tmp_path / "model", tmp_path / "keep"
    model.mkdir()
    keep.mkdir()
    config = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5}, "hidden_size": 8}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": []}))
    (model / "model.safetensors").write_bytes(b"weights")
    for _ in range(2):  # and once more over what is there
        copy = older_copy(model, keep)
        assert json.loads((copy / "config.json").read_text()) == config | {
            "rope_theta": 5e5,
            "torch_dtype": "bfloat16",
        }
        assert json.loads((copy / "tokenizer_config.json").read_text())["extra_special_tokens"] == {}
        assert (copy / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    assert json.loads((model / "config.json").read_text()) == config


def test_a_hybrid_as_gguf_has_the_names_and_the_order_that_llama_cpp_reads(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "linear_key_head_dim": 4, "linear_value_head_dim": 4,
    }  # fmt: skip
    folder, out = tmp_path / "model", tmp_path / "model.gguf"
    random_checkpoint.write({**random_checkpoint.SHAPES["Qwen3.5-4B"], **sizes}, folder, num_layers=4)
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        shard = load_file(path)
        shard |= {n: torch.linspace(-1, 1, len(t)).bfloat16() for n, t in shard.items() if t.dim() == 1}  # were ones
        save_file(shard, path)
        stored |= shard
    write_gguf.main(folder, out)

    found = {t.name: t for t in gguf.GGUFReader(out).tensors}
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN35]}
    layerless = {re.sub(r"^blk\.\d+", "blk.{bid}", name) for name in found}
    bases = {name.removesuffix(".weight").removesuffix(".bias") for name in layerless}
    assert bases == known - {"output"}  # the head is the embedding
    assert len(found) == len(stored)
    assert sum(int(t.n_elements) for t in found.values()) == sum(t.numel() for t in stored.values())

    def values(name: str) -> torch.Tensor:
        data = torch.from_numpy(np.array(found[name].data))
        return data if data.dtype == torch.float32 else data.view(torch.bfloat16).float()

    mixer, heads = "model.layers.0.linear_attn.", [0, 3, 1, 4, 2, 5]
    numbers = torch.arange(24).view(6, 4)[heads].flatten()
    assert torch.equal(values("blk.0.ssm_alpha.weight"), stored[f"{mixer}in_proj_a.weight"].float()[heads])
    assert torch.equal(values("blk.0.ssm_out.weight"), stored[f"{mixer}out_proj.weight"].float()[:, numbers])
    rows = torch.cat([torch.arange(16), 16 + numbers])
    assert torch.equal(values("blk.0.attn_qkv.weight"), stored[f"{mixer}in_proj_qkv.weight"].float()[rows])
    assert torch.equal(values("blk.0.ssm_conv1d.weight"), stored[f"{mixer}conv1d.weight"].float()[rows, 0])
    assert torch.allclose(values("blk.0.ssm_a"), -stored[f"{mixer}A_log"].float()[heads].exp())
    assert torch.equal(values("blk.0.ssm_norm.weight"), stored[f"{mixer}norm.weight"].float())
    assert torch.equal(values("output_norm.weight"), stored["model.norm.weight"].float() + 1)
    query = "model.layers.3.self_attn.q_proj.weight"  # halves are rotated, as in the checkpoint
    assert torch.equal(values("blk.3.attn_q.weight"), stored[query].float())
