"""A config of a few layers and a million weights that says everything else that the full one says.

Pure: configs in, configs out. It goes by what a config declares (names and values), so a family needs no entry here:

- sizes of one kind become one size, so what was equal stays equal; sizes of heads keep their ratios;
- of the layers, one of every kind stays, and lists, counts and overrides by layer are cut with them;
- whatever begins at a position (windows, chunks, top-k of keys, scales) begins within :data:`REACHED` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from layerstream.setup.shrunken_layers import Layers

REACHED = 32
"""Positions that all windows, chunks and scales are shorter than."""
CONTEXT = 192
"""Tokens that a shrunken model may be given at least."""
VOCAB_SIZE = 512
NUM_KEPT_IDS = 3
"""Special tokens with ids below this keep them: some families count positions from the id of the padding."""
ORDINARY_IDS = range(NUM_KEPT_IDS, 448)
"""Tokens that no shrunken config calls special."""


def ordinary_steps(answer: Seq[int]) -> int:
    """Steps of *answer* that follow ordinary tokens alone: of others a model may make what it likes (an image)."""
    return next((at + 1 for at, token in enumerate(answer) if token not in ORDINARY_IDS), len(answer))


_HEADS, _KV_HEADS, _HEAD_SIZE, _ROPE_HEAD_SIZE = 4, 2, 16, 8
_LONGEST = 1024
_LIMITED_ROPE = {"dynamic", "longrope"}
"""They choose frequencies by the longest position, so no engine goes past the original context."""

_MOST: tuple[tuple[str, int], ...] = (
    (r"vocab", VOCAB_SIZE),
    (r"(experts_per_tok(en)?|(?<!index)_top_?k|moe_k)$", 2),
    (r"^(moe_)?num_(local_)?experts$|routed_experts$", 8),
    (r"shared_experts$|zero_expert_num$|^n_groups?$|^num_expert_group$", 2),
    (r"^topk_group$", 1),
    (r"^num_heads$", 8),
    (r"^(mamba|linear)_.*(head_?dim|d_head)$|state_size$|d_state$", 16),
    (r"(^|_)heads?(_per_layer)?$", _HEADS),
    (r"window(_size|_len)?$|attention_chunk_size$|^local_attention$", 24),
    (r"index_topk(_blocks)?$|^index_block_size$|(^|_)n_floor$|^floor_scale$|^rel_extent$", 16),
    (r"(moe|expert).*(intermediate|ffn|hidden)", 48),
    (r"intermediate_size|ffn|feed_forward|^d_?ff$|dim_ff$|^d_inner$|mlp_dim$", 96),
    (r"per_layer_input$", 32),
    (r"num_filters$", 4),
    (r"lora_rank$|_rank$", 32),
    (r"(image|patch|kernel|merge|stride|pool|crop|chunk|block|group|temporal|codebook|bucket)\w*_sizes?$", 2**62),
    (r"(size|dim|width|channel|feature)s?$|d_model$|n_embd$|d_ssm$", 64),
)  # fmt: skip
"""The most of whatever has a name of this form; the first that fits holds."""
_OF_MIXERS: tuple[tuple[str, int], ...] = (
    (r"^(mamba_)?(n|num)_heads$", 8),
    (r"^mamba_(d_head|head_?dim)$", 16),
    (r"^mamba_d_ssm$", 128),
)
"""Of configs that say by how much a mixer is wider than hidden states, mostly twice: heads fill that width."""
_WIDER = ("expand", "mamba_expand")
_STANDARD = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "vocab_size", "num_experts", "num_local_experts", "num_experts_per_tok",
}  # fmt: skip
"""Names that other names of a family's own may stand for, as its attribute map says."""
_HEAD_SIZES = re.compile(r"(^|_)(head_dim|head_size|rotary_dim|d_kv|dim_head|kv_channels)$")
_TOKEN_IDS = re.compile(r"(token_ids?|token_index|(?<!layer)_ids?)$")
_LONGEST_POSITION = re.compile(r"^(max_position_embeddings|model_max_length|n_positions|max_seq_len)$")


def shrink(config: Any) -> Any:
    """*config* with few and small layers, towers as well, of the same class.

    Raises:
        Exception: what the family's own checks say of the shrunken config.
    """
    return type(config).from_dict(_Shrinker().shrunk(config))


@dataclass(slots=True)
class _Shrinker:
    """What the parts of one config share: new token ids by old ones, each its own, from the top of the vocabulary."""

    token_ids: dict[int, int] = field(default_factory=dict[int, int])

    def shrunk(self, config: Any) -> dict[str, Any]:
        """*config* as its class reads it from a file."""
        said = config.to_dict()
        said.pop("quantization_config", None)
        standard = {own: name for name, own in config.attribute_map.items() if name in _STANDARD}
        sizes = _Sizes.of(config)
        layers = Layers.of({standard.get(name, name): value for name, value in said.items()})
        small: dict[str, Any] = {}
        for own, value in said.items():
            name, part = standard.get(own, own), getattr(config, own, None) if isinstance(value, dict) else None
            if isinstance(part, PreTrainedConfig):
                small[own] = {**self.shrunk(part), "model_type": part.model_type}
            elif layers is not None and layers.are_told_by(name, value):
                small[own] = layers.cut(name, value, sizes.smaller)
            elif _TOKEN_IDS.search(name):
                small[own] = self._ids(value)
            else:
                small[own] = sizes.smaller(name, value)
        return small

    def _ids(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._ids(item) for item in value]
        if type(value) is not int or value < NUM_KEPT_IDS:
            return value
        return self.token_ids.setdefault(value, VOCAB_SIZE - 1 - len(self.token_ids))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How the numbers of one config shrink.

    Attributes:
        head_unit: what sizes of heads are divided by.
        heads: numbers of attention heads, by the names that they have.
        stretch: how many times its original context the model was made to reach; ``None``: it was not.
        is_limited: whether it must stay within the original context all the same.
        is_wider: whether mixers have a width of their own.
    """

    head_unit: float
    heads: dict[str, int]
    stretch: float | None
    is_limited: bool
    is_wider: bool

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        def said(name: str) -> Any:
            return config._getattr_without_heterogeneous_validation(name, None)

        heads = said("num_attention_heads")
        width, rotated = said("head_dim"), said("qk_rope_head_dim")
        if not width and isinstance(hidden := said("hidden_size"), int) and isinstance(heads, int):
            width = hidden // heads
        unit = rotated / _ROPE_HEAD_SIZE if rotated else width / _HEAD_SIZE if isinstance(width, int) else 8
        ropes = list(_ropes(said("rope_parameters") or {}))
        original = next((rope[_ORIGINAL] for rope in ropes if rope.get(_ORIGINAL)), said(_ORIGINAL))
        longest = said("max_position_embeddings")
        return cls(
            head_unit=max(1.0, unit),
            heads={name: value for name in _names_of_heads(config) if isinstance(value := said(name), int)},
            stretch=max(1.0, longest / original) if original and longest else None,
            is_limited=any(rope.get("rope_type") in _LIMITED_ROPE for rope in ropes),
            is_wider=any(said(name) for name in _WIDER),
        )

    def smaller(self, name: str, value: Any) -> Any:
        """*value* of the field *name*."""
        if name.startswith("rope_") and isinstance(value, dict):
            return {key: self._of_rope(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            return [self.smaller(name, item) for item in value]
        if type(value) is not int or value <= 0:
            return value
        if name == _ORIGINAL:
            return self._original
        if _LONGEST_POSITION.search(name):
            return max(CONTEXT, min(value, _LONGEST) if self.stretch is None else round(self._original * self.stretch))
        if name == "vocab_size":
            return VOCAB_SIZE
        if re.search(r"(key_value|kv)(_n)?_heads$", name):
            return self._kv_heads(name, value)
        if self.is_wider and (exact := next((size for pattern, size in _OF_MIXERS if re.search(pattern, name)), None)):
            return exact
        if _HEAD_SIZES.search(name) and not re.match("mamba|linear", name):
            return max(2, round(value / self.head_unit / 2) * 2)
        return min(value, next((most for pattern, most in _MOST if re.search(pattern, name)), value))

    @property
    def _original(self) -> int:
        """The context that the model is said to have been made for first."""
        assert self.stretch is not None
        return CONTEXT if self.is_limited else max(REACHED, round(CONTEXT / self.stretch))

    def _kv_heads(self, name: str, value: int) -> int:
        queries = self.heads.get(re.sub(r"(key_value|kv_n|kv)_heads$", "attention_heads", name))
        return 1 if value == 1 else _HEADS if value == (queries or self.heads.get("num_attention_heads")) else _KV_HEADS

    def _of_rope(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):  # of one kind of layer
            return {key: self._of_rope(key, item) for key, item in value.items()}
        if name == "mrope_section":
            ends = [round(sum(value[: at + 1]) / self.head_unit) for at in range(len(value))]
            return [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if name in {"short_factor", "long_factor"}:
            return _spread(value, round(len(value) / self.head_unit))
        return self.smaller(name, value) if type(value) is int else value


_ORIGINAL = "original_max_position_embeddings"


def _ropes(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """The one, or that of every kind of layer."""
    return [rope] if "rope_type" in rope else [item for item in rope.values() if isinstance(item, dict)]


def _names_of_heads(config: Any) -> list[str]:
    return ["num_attention_heads", *(name for name in vars(config) if name.endswith("attention_heads"))]


def _spread(values: Seq[float], count: int) -> list[float]:
    """*count* of *values*, evenly."""
    return [values[at * len(values) // count] for at in range(count)]
