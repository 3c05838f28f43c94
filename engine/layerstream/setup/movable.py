"""Whether what a model caches can be moved to other positions: tried on a small copy of it.

The copy (:mod:`layerstream.setup.shrunken`) goes over the same tokens at two places. What it cached at the first, moved
to the second, has to be what it cached there. That is so where positions enter by rotations, or by distances alone. It
is not where they are added to embeddings, scale queries, or choose frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from layerstream.errors import UnsupportedModel
from layerstream.model.anatomy import dissect
from layerstream.model.skeleton import Skeleton, build_meta
from layerstream.model.trace import trace
from layerstream.model.traced import LayerTrace, Trace
from layerstream.model.turning import Turner
from layerstream.setup.shrunken import ORDINARY_IDS, shrink
from layerstream.setup.shrunken_model import draw_model

NUM_TOKENS = 30
DISTANCE = 37
TOLERANCE = 1e-3
"""Of the largest value, in fp32. Rotations leave 1e-6 of it; what cannot be moved differs by a tenth or more."""
_BY_LONGEST = {"dynamic", "longrope"}


def check_movable(skeleton: Skeleton, *, trust_remote_code: bool = False, is_on_device: bool = False) -> None:
    """Whether prompts of the model in *skeleton* may be blended.

    Raises:
        UnsupportedModel: they may not; says why.
    """
    if reason := _reason(skeleton.model.config, skeleton.trace, trust_remote_code, is_on_device):
        raise UnsupportedModel(
            f"reuse='anywhere' is not possible with {skeleton.config.model_type!r}: {reason}; leave it at reuse='exact'"
        )


def _reason(config: Any, seen: Trace, trust_remote_code: bool, is_on_device: bool) -> str | None:
    if is_on_device:
        return "moving KV within an accelerator's pages is not written yet"
    if seen.recurrent:
        return "its recurrent layers keep one state for all tokens so far, which cannot be moved"
    if not all(seen.layers[layer].is_movable for layer in seen.keepers):
        return "its keys are rotated in a way that this version does not know"
    if kinds := _rope_types(config) & _BY_LONGEST:
        return f"its positions ({', '.join(sorted(kinds))}) depend on how long the prompt is"
    try:
        difference = _difference(config, trust_remote_code)
    except Exception as error:  # noqa: BLE001  # whatever its family's own code says of a small copy
        return f"a small copy of it could not be tried ({type(error).__name__}: {error!s:.120})"
    if not difference <= TOLERANCE:  # NaN neither
        return f"what it caches depends on positions otherwise than by rotations (a small copy is {difference:.0%} off)"
    return None


def _rope_types(config: Any) -> set[str]:
    said = getattr(config, "rope_parameters", None) or {}
    parts = [said, *(part for part in said.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in parts if part.get("rope_type")}


@torch.inference_mode()
def _difference(config: Any, trust_remote_code: bool) -> float:
    """Between what the copy cached at a distance, and what it cached here and was moved there: of the largest value."""
    model = draw_model(shrink(config), trust_remote_code=trust_remote_code)
    skeleton = build_meta(model.config, torch.float32, trust_remote_code)
    seen = trace(dissect(skeleton))
    ids = torch.arange(ORDINARY_IDS.start, ORDINARY_IDS.start + NUM_TOKENS)[None]
    here, there = (_cached(model, ids, offset) for offset in (0, DISTANCE))
    modules = dict(skeleton.named_modules())
    layers = [seen.layers[layer] for layer in seen.keepers]
    if len(here) != len(layers):
        return float("nan")
    return max(
        _off(mine, other)
        for layer, first, second in zip(layers, here, there, strict=True)
        for mine, other in zip(_moved(layer, first, modules), second, strict=True)
    )


def _cached(model: Any, ids: torch.Tensor, offset: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values ``(1, heads, tokens, width)`` of each layer that caches, the first token at position *offset*."""
    cache = DynamicCache()
    positions = torch.arange(offset, offset + ids.shape[1])[None]
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]  # type: ignore[attr-defined]


def _moved(
    layer: LayerTrace, cached: tuple[torch.Tensor, torch.Tensor], modules: dict[str, torch.nn.Module]
) -> tuple[torch.Tensor, torch.Tensor]:
    if layer.turn is None:
        return cached
    return Turner(layer.turn, modules[layer.turn.angles]).moved(*cached, DISTANCE)


def _off(mine: torch.Tensor, other: torch.Tensor) -> float:
    return float((mine - other).abs().max() / other.abs().max())
