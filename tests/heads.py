"""Multi-token-prediction heads beside small random models, as published checkpoints have them, and what such a head
says, computed the long way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import FAMILIES, make_model

FILE = "model.safetensors"
OWN = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"}
"""Models whose heads are below ``mtp.``."""
BEHIND = {"glm4_moe", "deepseek_v3", "glm4_moe_lite"}
"""Models whose heads are layers behind the last."""
HEADED = [name for name, small in FAMILIES.items() if small.model_type in OWN | BEHIND]


@dataclass
class Head:
    """A head in plain modules: *tensors* by role, and *layer*, a transformers model of one layer."""

    tensors: dict[str, torch.Tensor]
    layer: Any
    embedding: torch.nn.Module
    output: torch.nn.Module

    def logits(self, token_ids: list[int], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n - 1, vocabulary)``, ``(n - 1, width)``: what it says after each of *token_ids* but the last, whose final
        hidden states in the model are *hidden* ``(n - 1 or more, width)``."""
        embedded = self.embedding(torch.tensor(token_ids[1:]))
        both = [self._norm("embedding", embedded), self._norm("hidden", hidden[: len(embedded)])]
        x = torch.cat(both, dim=-1) @ self.tensors["projection"].T
        found = self.layer.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        return self.output(found), found

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        norm = copy.deepcopy(self.layer.model.norm)
        norm.weight.data = self.tensors[name]
        return norm(x)


def make_with_head(family: str, folder: Path, **sizes: Any) -> tuple[Any, Head]:
    """Write a random model of *family* with a head to *folder*, and return both."""
    model = make_model(family, folder, sizes=sizes)
    layer = _make_layer(folder, folder.parent / f"{folder.name}-layer")
    width = model.config.get_text_config().hidden_size
    torch.manual_seed(2)
    tensors = {
        "projection": torch.randn(width, 2 * width) * 0.2,
        "embedding": 1 + torch.randn(width) * 0.1,
        "hidden": 1 + torch.randn(width) * 0.1,
    }
    write_head(folder, folder.parent / f"{folder.name}-layer", tensors)
    return model, Head(tensors, layer, model.get_input_embeddings(), model.get_output_embeddings())


def write_head(folder: Path, layer_folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put a head of *tensors* and the one layer of *layer_folder* into *folder*, by the names of its family."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    stored = load_file(layer_folder / "model.safetensors")
    is_own = config.model_type in OWN
    where = "mtp." if is_own else f"model.layers.{config.num_hidden_layers}."
    names = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    if not is_own:
        names = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
    found = {
        f"{where}{names[0]}.weight": tensors["projection"],
        f"{where}{names[1]}.weight": tensors["embedding"],
        f"{where}{names[2]}.weight": tensors["hidden"],
        f"{where}{names[3]}.weight": stored["model.norm.weight"],
    }
    for name, tensor in stored.items():
        if name.startswith("model.layers.0."):
            found[where + name.removeprefix("model." if is_own else "model.layers.0.")] = tensor
    if not is_own:  # published ones have copies
        found[f"{where}embed_tokens.weight"] = stored["model.embed_tokens.weight"]
        found[f"{where}shared_head.head.weight"] = stored["lm_head.weight"]
    change_tensors(folder, lambda tensors: tensors.update(found))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Have *change* do something to the tensors in *folder*."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


def make_sure_head(family: str, folder: Path, **sizes: Any) -> None:
    """Write a model of *family* whose head is always right to *folder*: what comes next depends on the last token
    alone, since no layer adds anything, and the head passes its embedding on."""
    model, head = make_with_head(family, folder, **sizes)
    width = model.config.get_text_config().hidden_size

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if any(part in name for part in (".o_proj", ".out_proj", ".down_proj")):
                tensor.zero_()
            elif name.endswith("lm_head.weight"):  # it is sure of what comes next
                tensor.mul_(10.0)
            elif tensor.dim() == 1 and "norm" in name:
                tensor.fill_(1.0)
            elif torch.equal(tensor, head.tensors["projection"]):
                tensor.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    change_tensors(folder, change)


def _make_layer(folder: Path, layer_folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder).get_text_config()
    said = config.to_dict()
    said["num_hidden_layers"] = 1
    for name in ("first_k_dense_replace", "mlp_only_layers"):
        if said.get(name) is not None:
            said[name] = type(said[name])()
    if said.get("layer_types") is not None:
        said["layer_types"] = ["full_attention"]
    if said.get("mlp_layer_types") is not None:
        said["mlp_layer_types"] = said["mlp_layer_types"][-1:]
    config = type(config).from_dict(said)
    torch.manual_seed(1)
    layer = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 0.2 + ("norm" in name and tensor.dim() == 1))
    layer.save_pretrained(layer_folder)
    return AutoModelForCausalLM.from_pretrained(layer_folder, dtype=torch.float32, attn_implementation="eager").eval()
