"""A model as a peer's older transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

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
