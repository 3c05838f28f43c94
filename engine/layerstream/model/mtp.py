"""The multi-token-prediction head of a checkpoint, as a model of one layer.

The head guesses the token after next. Its row at position *i* is given the model's final hidden state there, *h(i)*,
and the embedding of the token that follows, *t(i+1)*; its layer attends to its rows before it; its output, through the
model's output projection, says *t(i+2)*::

    x = projection([norm(embedding of t(i+1)), norm(h(i))])
    m(i) = norm(layer(x, position i))
    guess = argmax(output projection(m(i)))

To guess on, *m(i)* takes the place of *h(i+1)* and the guess that of *t(i+2)*. *h* and *m* are what comes out of the
final norms: that is how such heads were trained, and how vLLM, SGLang and LightLLM run them (llama.cpp and they agree
on the embedding coming first).

The layer is transformers' own: the checkpoint's model is built with one layer that attends to everything. What makes
one input of two is put before it, and its weights are found by the names of :mod:`layerstream.checkpoint.mtp_names`.
So whatever runs a model runs the head: formats, experts, rings, devices.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerstream.checkpoint.folder import Checkpoint, open_folder
from layerstream.checkpoint.mtp_names import FUSION, head_names
from layerstream.errors import LayerStreamError
from layerstream.model.anatomy import Anatomy, dissect
from layerstream.model.skeleton import Skeleton, adapt, build_meta, complete, load_config, resolve_stored
from layerstream.model.trace import trace

logger = logging.getLogger(__name__)

_ONE_LAYER = {
    "layer_types": ["full_attention"],
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""What a config of one layer says of it."""


class Fusion(torch.nn.Module):
    """Makes one input of an embedding and a hidden state, ``(1, rows, width)`` each.

    Args:
        norm: as both of its norms are, on the meta device.
    """

    def __init__(self, norm: torch.nn.Module, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_norm = copy.deepcopy(norm)
        self.hidden_norm = copy.deepcopy(norm)
        self.projection = torch.nn.Linear(2 * width, width, bias=False, device="meta", dtype=dtype)

    def forward(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``(1, rows, width)``."""
        return self.projection(torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1))


def with_mtp(skeleton: Skeleton, folder: Path, *, trust_remote_code: bool = False) -> Skeleton:
    """*skeleton* with the head that lies in *folder*, if there is one that can be used.

    A head that is damaged or incomplete is left out, with a warning that says why.
    """
    if folder.suffix == ".gguf":
        return skeleton
    checkpoint = open_folder(folder)
    renamed = head_names([*checkpoint.tensors, *checkpoint.packed], getattr(skeleton.config, "num_hidden_layers", 0))
    if not renamed:
        return skeleton
    try:
        config = _one_layer(load_config(folder, trust_remote_code=trust_remote_code))
        head = _build(skeleton, checkpoint, config, renamed, trust_remote_code=trust_remote_code)
    except LayerStreamError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001  # whatever a class says of a config that it was not written for
        reason = f"{type(error).__name__}: {error!s:.200}"
    else:
        return dataclasses.replace(skeleton, mtp=head)
    logger.warning("%s: its multi-token-prediction head is left out and does not draft: %s", folder, reason)
    return skeleton


def _build(
    skeleton: Skeleton, checkpoint: Checkpoint, config: Any, renamed: Mapping[str, str], *, trust_remote_code: bool
) -> Skeleton:
    """The head whose tensors are *renamed*.

    Raises:
        LayerStreamError: a tensor is missing, or has another shape than the config says.
    """
    anatomy = dissect(build_meta(config, skeleton.dtype, trust_remote_code))
    _put_before(anatomy, skeleton.dtype)
    path = next(name for name, module in anatomy.model.named_modules() if module is anatomy.decoder)
    kept = {name: f"{path}.{target}" for name, target in renamed.items()}
    kept |= {name: name for name in _shared_names(skeleton, checkpoint)}
    checkpoint = dataclasses.replace(
        checkpoint,
        tensors={kept[name]: entry for name, entry in checkpoint.tensors.items() if name in kept},
        packed={kept[name]: matrix for name, matrix in checkpoint.packed.items() if name in kept},
    )
    traced = trace(anatomy)
    adapt(anatomy, traced)
    sources = resolve_stored(anatomy.model, checkpoint)
    return complete(anatomy, traced, sources, skeleton.dtype, anatomy.decoder.config, skeleton.tile_values)


def _one_layer(config: Any) -> Any:
    """*config* of a model with one layer, of the kind that its last one is, which attends to everything."""
    text = config.get_text_config(decoder=True)
    if (kinds := getattr(text, "mlp_layer_types", None)) is not None:
        text.mlp_layer_types = kinds[-1:]
    text.num_hidden_layers = 1
    for name, value in _ONE_LAYER.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    return config


def _put_before(anatomy: Anatomy, dtype: torch.dtype) -> None:
    """Have the decoder of *anatomy* take hidden states beside embeddings: ``previous``; nothing stands for zeros."""
    decoder, forward = anatomy.decoder, anatomy.decoder.forward
    fusion = Fusion(decoder.norm, anatomy.embedding.embedding_dim, dtype)
    decoder.add_module(FUSION, fusion)

    def run(inputs_embeds: torch.Tensor, previous: torch.Tensor | None = None, **others: Any) -> Any:
        previous = torch.zeros_like(inputs_embeds) if previous is None else previous
        return forward(inputs_embeds=fusion(inputs_embeds, previous), **others)

    decoder.forward = run


def _shared_names(skeleton: Skeleton, checkpoint: Checkpoint) -> set[str]:
    """Names in *checkpoint* of the embedding and the output projection that *skeleton* has."""
    shared = (skeleton.sources[skeleton.embedding_key], skeleton.sources[skeleton.head_key])
    stored = {piece.entry.name for source in shared for piece in source.pieces}
    packed = {name for name, matrix in checkpoint.packed.items() if stored & {e.name for e in matrix.planes.values()}}
    return stored | packed
