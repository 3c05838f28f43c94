"""Writes the bundled reader's exact function into a Llama of any larger shape.

    python -m benchmarks.grow SHAPE OUT [--dtype bf16|fp32] [--quantization nf4|int8|int4] [--reader FOLDER]

SHAPE is tiny, 3B, 8B, 70B, 405B or "hidden,intermediate,layers,heads,kv_heads,vocabulary". The grown model has the size
and the cost of its shape, and gives the reader's answers. Greedy decoding only: the added vocabulary rows tie.

How it stays the same function:

- the hidden state is padded with zeros; RMSNorm then sees a mean that is h/H times as large, so its epsilon is scaled
  by h/H and its weight by sqrt(h/H);
- an old head keeps its rotary frequencies: pair j of d/2 goes to pair j·D/d of D/2, and q is scaled by sqrt(D/d)
  because attention divides by sqrt(D);
- old heads take the first slots of their groups; the columns of ``o_proj`` for new heads are zero;
- new neurons have random gate and up rows, and zero columns in ``down_proj``;
- added layers have zero ``o_proj`` and ``down_proj``; added vocabulary rows copy the pad token's.

One part of a layer is in memory at a time: about 3 GB for 70B.

With ``--quantization`` Linears are written quantised, part by part, so that 70B takes 40 GB and never 140. Added layers
differ in where their random codes begin: every layer is read for itself, and quantising one of them is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from layerstream.checkpoint.codecs.encode import make_encoder
from layerstream.checkpoint.writer import ShardWriter, dtype_name
from safetensors.torch import load_file

READER = Path(__file__).resolve().parents[1] / "engine" / "layerstream" / "demo" / "reader"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NOISE = 0.02
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(512, 768, 6, 8, 4, 2048),
    "3B": Shape(3072, 8192, 28, 24, 8, 128256),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),
    "405B": Shape(16384, 53248, 126, 128, 8, 128256),
}


def parse_shape(text: str) -> Shape:
    """A named shape, or six numbers separated by commas."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) != 6 or not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"shape {text!r}: expected one of {', '.join(SHAPES)} or six numbers")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = map(int, numbers)
    return Shape(hidden, intermediate, layers, heads, kv_heads, vocabulary)


def check_growth(old: Shape, new: Shape) -> None:
    """Raise ``ValueError`` if *old* does not fit into *new*."""
    smaller = [
        name
        for name in ("hidden", "intermediate", "layers", "kv_heads", "group", "vocabulary")
        if getattr(new, name) < getattr(old, name)
    ]
    if smaller:
        raise ValueError(f"{', '.join(smaller)} smaller than the reader's: {new} < {old}")
    if new.hidden % new.heads or new.heads % new.kv_heads or new.head_dim % old.head_dim:
        raise ValueError(f"{new}: heads must divide hidden, kv_heads heads, and {old.head_dim} the head dimension")


class Grower:
    """Makes the tensors of a grown model, part by part.

    Args:
        weights: the reader's tensors.
        config: the reader's config.json.
        new: the shape to grow to.
        dtype: of the tensors.
    """

    def __init__(self, weights: Tensors, config: dict, new: Shape, dtype: torch.dtype) -> None:
        self._weights = {name: tensor.float() for name, tensor in weights.items()}
        self._old = read_shape(config)
        self._new = new
        self._dtype = dtype
        self._random = torch.Generator().manual_seed(0)
        check_growth(self._old, new)

    @property
    def num_old_layers(self) -> int:
        """The reader's; those after them are added."""
        return self._old.layers

    @property
    def num_layers(self) -> int:
        """Of the grown model."""
        return self._new.layers

    def parts(self) -> Iterator[Tensors]:
        """Tensors of one file after the other, in the order of the forward pass."""
        return (part for _, part in self.parts_by_layer(self._new.layers))

    def parts_by_layer(self, num_layers: int) -> Iterator[tuple[int | None, Tensors]]:
        """The same with the layer that they belong to; of the first *num_layers* alone."""
        yield None, {"model.embed_tokens.weight": self._vocabulary("model.embed_tokens.weight")}
        for layer in range(min(num_layers, self._new.layers)):
            yield layer, self._attention(layer)
            yield layer, self._mlp(layer)
        yield None, {"model.norm.weight": self._norm("model.norm.weight")}
        if not self._new.tied:
            name = "lm_head.weight"
            yield None, {name: self._vocabulary(name if name in self._weights else "model.embed_tokens.weight")}

    def _vocabulary(self, name: str) -> torch.Tensor:
        """``(vocabulary, hidden)``; rows that the reader lacks copy the pad token's, row 0."""
        old = self._weights[name]
        grown = torch.zeros(self._new.vocabulary, self._new.hidden, dtype=self._dtype)
        grown[:, : self._old.hidden] = old[0]
        grown[: len(old), : self._old.hidden] = old
        return grown

    def _norm(self, name: str) -> torch.Tensor:
        """``(hidden,)``; ones for an added layer."""
        scale = math.sqrt(self._old.hidden / self._new.hidden)
        grown = torch.full((self._new.hidden,), scale, dtype=torch.float32)
        if name in self._weights:
            grown[: self._old.hidden] = self._weights[name] * scale
        return grown.to(self._dtype)

    def _attention(self, layer: int) -> Tensors:
        old, new, prefix = self._old, self._new, f"model.layers.{layer}."
        tensors = {
            prefix + "input_layernorm.weight": self._norm(prefix + "input_layernorm.weight"),
            prefix + "self_attn.q_proj.weight": self._noise(new.heads * new.head_dim, new.hidden),
            prefix + "self_attn.k_proj.weight": self._noise(new.kv_heads * new.head_dim, new.hidden),
            prefix + "self_attn.v_proj.weight": self._noise(new.kv_heads * new.head_dim, new.hidden),
            prefix + "self_attn.o_proj.weight": torch.zeros(new.hidden, new.heads * new.head_dim, dtype=self._dtype),
        }
        if layer >= old.layers:
            return tensors
        stretch = new.head_dim // old.head_dim
        pairs = torch.arange(old.head_dim // 2) * stretch
        rotary = torch.cat([pairs, pairs + new.head_dim // 2])
        plain = torch.arange(old.head_dim)
        scales = {"q": math.sqrt(stretch), "k": 1.0, "v": 1.0}
        for letter, scale in scales.items():
            name = f"{prefix}self_attn.{letter}_proj.weight"
            heads = old.heads if letter == "q" else old.kv_heads
            for head in range(heads):
                slot = self._slot(head) if letter == "q" else head
                source = self._weights[name][head * old.head_dim : (head + 1) * old.head_dim]
                target = tensors[name][slot * new.head_dim : (slot + 1) * new.head_dim]
                target.zero_()
                target[plain if letter == "v" else rotary, : old.hidden] = (source * scale).to(self._dtype)
        name = prefix + "self_attn.o_proj.weight"
        for head in range(old.heads):
            first = self._slot(head) * new.head_dim
            source = self._weights[name][:, head * old.head_dim : (head + 1) * old.head_dim]
            tensors[name][: old.hidden, first : first + old.head_dim] = source.to(self._dtype)
        return tensors

    def _slot(self, head: int) -> int:
        """The new place of an old query head: as before within the group of its key-value head."""
        return head // self._old.group * self._new.group + head % self._old.group

    def _mlp(self, layer: int) -> Tensors:
        old, new, prefix = self._old, self._new, f"model.layers.{layer}."
        tensors = {
            prefix + "post_attention_layernorm.weight": self._norm(prefix + "post_attention_layernorm.weight"),
            prefix + "mlp.gate_proj.weight": self._noise(new.intermediate, new.hidden),
            prefix + "mlp.up_proj.weight": self._noise(new.intermediate, new.hidden),
            prefix + "mlp.down_proj.weight": torch.zeros(new.hidden, new.intermediate, dtype=self._dtype),
        }
        if layer >= old.layers:
            return tensors
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            tensors[prefix + name][: old.intermediate] = 0
            tensors[prefix + name][: old.intermediate, : old.hidden] = self._weights[prefix + name].to(self._dtype)
        name = prefix + "mlp.down_proj.weight"
        tensors[name][: old.hidden, : old.intermediate] = self._weights[name].to(self._dtype)
        return tensors

    def _noise(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=self._dtype).normal_(std=NOISE, generator=self._random)


class Packer:
    """Quantises the Linears of what a grower makes.

    Args:
        kind: ``"nf4"``, ``"int8"`` or ``"int4"``.
    """

    def __init__(self, grower: Grower, kind: str) -> None:
        self._grower = grower
        self._encoder = make_encoder(kind)
        self.config = self._encoder.config(["lm_head"])
        self._added: list[Tensors] = []

    def parts(self) -> Iterator[Tensors]:
        """As :meth:`Grower.parts`; of the added layers one is made, and the others begin elsewhere in its codes."""
        for layer, part in self._grower.parts_by_layer(self._grower.num_old_layers + 1):
            packed = {}
            for name, tensor in part.items():
                packed |= self._packed(name, tensor)
            if layer == self._grower.num_old_layers:
                self._added.append(packed)
            if layer is None and self._added and "model.norm.weight" in packed:
                yield from self._more_layers()
            yield packed

    def _packed(self, name: str, tensor: torch.Tensor) -> Tensors:
        is_linear = name.endswith("_proj.weight") and self._encoder.can(*tensor.shape)
        if not is_linear:
            return {name: tensor}
        step = self._encoder.row_step * 16
        rows = (tensor[at : at + step] for at in range(0, len(tensor), step))
        shapes = {plane: shape for plane, _, shape in self._encoder.planes(name, tuple(tensor.shape), tensor.dtype)}
        planes = self._encoder.encode(name, tuple(tensor.shape), tensor.dtype, rows)
        return {plane: torch.cat([part.reshape(-1) for part in parts]).view(shapes[plane]) for plane, parts in planes}

    def _more_layers(self) -> Iterator[Tensors]:
        first = self._grower.num_old_layers
        for layer in range(first + 1, self._grower.num_layers):
            for part in self._added:
                yield {
                    name.replace(f"layers.{first}.", f"layers.{layer}."): self._turned(name, tensor, layer)
                    for name, tensor in part.items()
                }

    def _turned(self, name: str, tensor: torch.Tensor, layer: int) -> torch.Tensor:
        if not name.endswith("_proj.weight"):
            return tensor
        return torch.roll(tensor.reshape(-1), 4096 * layer).view(tensor.shape)


def read_shape(config: dict) -> Shape:
    """The shape that a config.json describes."""
    return Shape(
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
        config["tie_word_embeddings"],
    )


def grow_config(config: dict, new: Shape, dtype_name: str) -> dict:
    """The reader's config.json with the sizes of *new*."""
    return config | {
        "hidden_size": new.hidden,
        "intermediate_size": new.intermediate,
        "num_hidden_layers": new.layers,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.kv_heads,
        "head_dim": new.head_dim,
        "vocab_size": new.vocabulary,
        "tie_word_embeddings": new.tied,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / new.hidden,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype_name],
    }


def grow(
    shape: Shape,
    out: Path,
    dtype: str = "bf16",
    reader: Path = READER,
    report: Callable[[str], None] = lambda line: None,
    quantization: str | None = None,
) -> Path:
    """Write the grown model to the folder *out* and return it.

    Args:
        dtype: ``"bf16"`` or ``"fp32"``.
        quantization: of Linears: ``"nf4"``, ``"int8"``, ``"int4"``.
        reader: folder of the model to grow.
        report: called with a line for each file written.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((reader / "config.json").read_text())
    grower = Grower(load_file(reader / "model.safetensors"), config, shape, DTYPES[dtype])
    packer = None if quantization is None else Packer(grower, quantization)
    total = 2 * shape.layers + (2 if shape.tied else 3)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for index, tensors in enumerate((packer or grower).parts(), start=1):
        file = f"model-{index:05d}-of-{total:05d}.safetensors"
        shapes = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ShardWriter(out / file, shapes) as shard:
            for name, tensor in tensors.items():
                shard.write(name, [tensor])
        weight_map |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        report(f"{index}/{total} {file} {num_bytes / 1e9:.1f} GB")
    index_json = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))
    grown = grow_config(config, shape, dtype)
    if packer is not None:
        grown["quantization_config"] = packer.config
    (out / "config.json").write_text(json.dumps(grown, indent=2))
    for name in _COPIED:
        if (reader / name).exists():
            shutil.copyfile(reader / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=parse_shape)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quantization", choices=("nf4", "int8", "int4"))
    parser.add_argument("--reader", type=Path, default=READER)
    options = parser.parse_args()
    grow(options.shape, options.out, options.dtype, options.reader, print, options.quantization)


if __name__ == "__main__":
    main()
