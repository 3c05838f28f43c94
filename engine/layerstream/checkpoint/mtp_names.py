"""Where a checkpoint keeps its multi-token-prediction head, by the names of its tensors. Pure.

Two layouts are known. Both say the same things: norms of an embedding and of a hidden state, a projection of both to
one, a decoder layer, a final norm. Embedding and output projection are the model's; copies of them are left out.

| | Qwen3-Next, Qwen3.5 and later | DeepSeek-V3, GLM-4.5 and later |
|---|---|---|
| where | ``mtp.`` | ``layers.N.``, N the number of the model's layers |
| norm of the embedding | ``pre_fc_norm_embedding`` | ``enorm`` |
| norm of the hidden state | ``pre_fc_norm_hidden`` | ``hnorm`` |
| projection | ``fc`` | ``eh_proj`` |
| decoder layer | ``layers.0.`` | ``layers.N.`` itself |
| final norm | ``norm`` | ``shared_head.norm`` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

FUSION = "fusion"
"""Name of the module that makes one input of embedding and hidden state."""

_OWN = {
    "fc": f"{FUSION}.projection",
    "pre_fc_norm_embedding": f"{FUSION}.embedding_norm",
    "pre_fc_norm_hidden": f"{FUSION}.hidden_norm",
    "norm": "norm",
}
_BEHIND = {
    "eh_proj": f"{FUSION}.projection",
    "enorm": f"{FUSION}.embedding_norm",
    "hnorm": f"{FUSION}.hidden_norm",
    "shared_head.norm": "norm",
}
_SHARED = re.compile(r"^(shared_head\.head|embed_tokens)\.")


def head_names(names: Iterable[str], num_layers: int) -> dict[str, str]:
    """What the tensors of a head among *names* are within a decoder of one layer; empty: there is no head.

    Args:
        num_layers: of the model.
    """
    names = list(names)
    own = _renamed(names, re.compile(r"^mtp\.(.*)$"), _OWN, _layer_of_its_own)
    return own or _renamed(names, re.compile(rf"^(?:.*\.)?layers\.{num_layers}\.(.*)$"), _BEHIND, _layer_behind)


def _renamed(
    names: list[str], where: re.Pattern[str], parts: dict[str, str], layer: Callable[[str], str | None]
) -> dict[str, str]:
    found: dict[str, str] = {}
    is_head = False
    for name in names:
        if (match := where.match(name)) is None:
            continue
        part = next((part for part in parts if match[1].startswith(f"{part}.")), None)
        is_head = is_head or part is not None
        target = layer(match[1]) if part is None else parts[part] + match[1][len(part) :]
        if target is not None:
            found[name] = target
    return found if is_head else {}


def _layer_of_its_own(name: str) -> str | None:
    """Of several layers, the first drafts again and again."""
    return name if name.startswith("layers.0.") else None


def _layer_behind(name: str) -> str | None:
    return None if _SHARED.match(name) else f"layers.0.{name}"
