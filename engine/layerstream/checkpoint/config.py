"""Whether what ``config.json`` says can be the model that its weights are of; pure, before any library sees it.

Sizes are whole numbers in their range, fit each other, and are no larger than the stored tensors could be: a library
would build whatever they ask for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from layerstream.errors import InvalidHeader

PACKED_VALUES = 8  # the most that one stored number of a quantised matrix stands for along a row
_LARGEST = 2**62
_POSITIVE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "first_k_dense_replace",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_LENGTHS = ("sliding_window", "attention_chunk_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_config(config: Mapping[str, Any], where: str, shapes: Collection[tuple[int, ...]]) -> None:
    """See that *config*, and the ``text_config`` in it, are of a model whose weights have *shapes*.

    Raises:
        InvalidHeader: names the field, what it says and what was expected.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InvalidHeader(f"{where}: model_type is {model_type!r:.80}; expected the name of a family, as 'llama'")
    most = PACKED_VALUES * max(len(shapes), *(max(shape, default=1) for shape in shapes), 1)
    text = config.get("text_config")
    for part in (config, *([text] if isinstance(text, Mapping) else [])):
        for problem in _problems(part, most, len(shapes)):
            raise InvalidHeader(f"{where}: {problem}; fetch it again, or correct it")


def _problems(config: Mapping[str, Any], most: int, num_tensors: int) -> Iterator[str]:
    for names, least, largest in (
        (_POSITIVE, 1, most),
        (_COUNTS, 0, most),
        (("num_hidden_layers",), 1, num_tensors),
        (("max_position_embeddings",), 1, _LARGEST),
        (_LENGTHS, 0, _LARGEST),
    ):
        for name in names:
            said = config.get(name)
            values = said if isinstance(said, list) else [] if said is None else [said]
            if not all(type(value) is int and least <= value <= largest for value in values):
                yield f"{name} is {said!r:.80}; expected {least} to {largest}, by the weights that are there"
    heads, groups = (_one(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:
        yield f"num_attention_heads is {heads}, and num_key_value_heads {groups}, which does not divide it"
    if (_one(config, "head_dim") or 0) % 2:
        yield f"head_dim is {config['head_dim']}; rotary positions need an even one"
    wanted = _one(config, "num_experts_per_tok")
    for name in _EXPERTS:
        there = _one(config, name)
        if there and wanted is not None and not 1 <= wanted <= there:
            yield f"num_experts_per_tok is {wanted}; expected 1 to {there}, the {name}"


def _one(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) else None
