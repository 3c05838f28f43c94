"""What a ``quantization_config`` promises, as far as it decides whether weights are read right; pure.

A scheme that is not read exactly as it is meant is refused by what the config says, before a tensor is looked at: its
codes would have the shapes of another one's, and give numbers all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.errors import InvalidHeader, UnsupportedFormat

DEFAULT_BLOCK = (128, 128)
_INT4, _FP8 = "pack-quantized", ("float-quantized", "naive-quantized")
_INT4_STRATEGIES = frozenset({"group", "channel"})
_FP8_STRATEGIES = frozenset({"tensor", "channel", "block"})
_ADVICE = "use a version of the model in FP8, in 4-bit integers (W4A16) or in 16 bits, or pack the 16-bit original"


@dataclass(frozen=True, slots=True)
class CompressedScheme:
    """What compressed-tensors' groups of Linears have: *blocks* of FP8, *group_sizes* of integers; none: not said."""

    blocks: tuple[tuple[int, int], ...] = ()
    group_sizes: frozenset[int] = frozenset()


def method_of(quantisation: Mapping[str, Any]) -> str:
    """The method's name; bitsandbytes' first configs do not have it."""
    if "quant_method" not in quantisation and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        return "bitsandbytes"
    return str(quantisation.get("quant_method", "unknown"))


def fp8_blocks(quantisation: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the blocks of FP8 that share a scale; none: a scale for each row, or for all.

    As transformers' ``FineGrainedFP8Config``: 128 by 128 where the config does not say.
    """
    block = quantisation.get("weight_block_size", DEFAULT_BLOCK)
    return () if block is None else (_block(block, "weight_block_size"),)


def compressed_scheme(quantisation: Mapping[str, Any]) -> CompressedScheme:
    """What all groups of a compressed-tensors config say.

    Raises:
        UnsupportedFormat: one has a scheme that is not read.
        InvalidHeader: it makes no sense.
    """
    sparsity = quantisation.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedFormat(f"the weights are sparse ({sparsity.get('format')!r}), which is not read; {_ADVICE}")
    transforms = quantisation.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise UnsupportedFormat(f"the weights were rotated (transform_config), which is not undone; {_ADVICE}")
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise InvalidHeader(f"the quantization_config says config_groups {groups!r:.80}; expected groups by name")
    whole = quantisation.get("format")
    if not groups and whole not in {None, _INT4, *_FP8}:
        raise UnsupportedFormat(f"the weights are compressed as {whole!r}, which is not read; {_ADVICE}")
    blocks: list[tuple[int, int]] = []
    sizes: set[int] = set()
    for name, group in groups.items():
        weights = group.get("weights")
        if weights is None:
            continue
        if not isinstance(weights, Mapping):
            raise InvalidHeader(f"the quantization_config says weights {weights!r:.80} of {name!r}; expected an object")
        problems = list(_problems(group.get("format") or whole, group, weights))
        if problems:
            raise UnsupportedFormat(
                f"the weights of {name!r} are compressed with {', '.join(problems)}, which is not read; {_ADVICE}"
            )
        if weights.get("strategy") == "block":
            blocks.append(_block(weights.get("block_structure"), "block_structure"))
        size = weights.get("group_size")
        if weights.get("strategy") == "group" and (type(size) is not int or size < 1):
            raise InvalidHeader(f"the quantization_config says group_size {size!r:.80}; expected a number of columns")
        sizes |= {size} if type(size) is int and size > 0 else set()
    return CompressedScheme(tuple(dict.fromkeys(blocks)), frozenset(sizes))


def _problems(form: Any, group: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[str]:
    """What of a group is not read, as the config has it."""
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    if form in {"mixed-precision", None}:
        form = _INT4 if kind == "int" else _FP8[0]
    if form == _INT4:
        is_right = (kind, bits) == ("int", 4)
        strategies = _INT4_STRATEGIES
    elif form in _FP8:
        is_right = (kind, bits) == ("float", 8)
        strategies = _FP8_STRATEGIES
        if weights.get("symmetric") is False:
            yield "zero points of floats"
    else:
        yield f"format {form!r}"
        return
    if not is_right:
        yield f"format {form!r}, type {kind!r} and num_bits {bits!r}"
    if strategy is not None and strategy not in strategies:
        yield f"strategy {strategy!r}"
    if weights.get("dynamic"):
        yield "dynamic scales of weights"
    inputs = group.get("input_activations")
    if isinstance(inputs, Mapping) and (inputs.get("type", "int"), inputs.get("num_bits", 8)) != ("float", 8):
        yield f"activations of type {inputs.get('type', 'int')!r} and num_bits {inputs.get('num_bits', 8)!r}"
    if isinstance(group.get("output_activations"), Mapping):
        yield "quantised outputs"


def check_gptq(quantisation: Mapping[str, Any]) -> None:
    """Refuse what GPTQ's tools write and is not read.

    Raises:
        UnsupportedFormat: another layout, another integer, or bits that differ from module to module.
    """
    form = quantisation.get("checkpoint_format", "gptq")
    if form not in {"gptq", "gptq_v2", "", None}:
        raise UnsupportedFormat(f"the weights are in GPTQ's layout {form!r}; supported are 'gptq' and 'gptq_v2'")
    if (integer := quantisation.get("pack_dtype", "int32")) != "int32":
        raise UnsupportedFormat(f"the weights are packed into {integer!r}; supported is 'int32'")
    dynamic = quantisation.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(
        not str(pattern).startswith("-") and change for pattern, change in dynamic.items()
    ):
        raise UnsupportedFormat(f"the weights have settings by module (dynamic: {dynamic!r:.80}), which are not read")


def group_size(quantisation: Mapping[str, Any], columns: int) -> int:
    """Columns that share a scale; -1 means all."""
    size = quantisation.get("group_size", quantisation.get("q_group_size", 128))
    if type(size) is not int or size == 0 or size < -1:
        raise InvalidHeader(f"the quantization_config says group_size {size!r}; expected a number of columns, or -1")
    return columns if size == -1 else size


def _block(value: Any, name: str) -> tuple[int, int]:
    sizes = value.lower().split("x") if isinstance(value, str) else value
    if isinstance(sizes, list | tuple) and len(sizes) == 2:
        rows, columns = (int(size) if isinstance(size, str) and size.isdecimal() else size for size in sizes)
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise InvalidHeader(f"the quantization_config says {name} {value!r:.80}; expected rows and columns, as [128, 128]")
