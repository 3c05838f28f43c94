"""Writes the bundled reader's exact function into a Llama, or a mixture of experts, of any larger shape.

    python -m benchmarks.grow SHAPE OUT [--dtype bf16|fp32] [--quantization nf4|int8|int4] [--reader FOLDER]
                              [--layers N] [--skew EXPONENT]

SHAPE is tiny, 3B, 8B, 70B, 405B or "hidden,intermediate,layers,heads,kv_heads,vocabulary", or of a mixture tiny-moe,
Mixtral-8x7B, Qwen3-30B-A3B, DeepSeek-V3. The grown model has the size and the cost of its shape, and gives the reader's
answers. Greedy decoding only: the added vocabulary rows tie.

How it stays the same function:

- the hidden state is padded with zeros; RMSNorm then sees a mean that is h/H times as large, so its epsilon is scaled
  by h/H and its weight by sqrt(h/H);
- an old head keeps its rotary frequencies: pair j of d/2 goes to pair j·D/d of D/2, and q is scaled by sqrt(D/d)
  because attention divides by sqrt(D);
- old heads take the first slots of their groups; the columns of ``o_proj`` for new heads are zero;
- new neurons have random gate and up rows, and zero columns in ``down_proj``;
- added layers have zero ``o_proj`` and ``down_proj``; added vocabulary rows copy the pad token's.

In a mixture every expert is a copy of the MLP, and their weights add up to one. Attention is Llama's, as Mixtral and
GLM-4.5 have it: Qwen3's norms of queries and DeepSeek's latents would be another function. Where a row goes is random,
or skewed (:mod:`benchmarks.routers`). Gemma 4 and Qwen3-VL norm queries and keys, too:
:mod:`benchmarks.random_checkpoint` says why that cannot be the reader's function, and writes their shapes at random.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from layerstream.checkpoint.codecs.encode import make_encoder
from layerstream.checkpoint.writer import ShardWriter, dtype_name
from safetensors.torch import load_file

from benchmarks.routers import Routers

READER = Path(__file__).resolve().parents[1] / "engine" / "layerstream" / "demo" / "reader"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NOISE = 0.02
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

Tensors = dict[str, torch.Tensor]
_LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


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
    head: int = 0  # dimensions of one head, where they are not hidden / heads

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.head or self.hidden // self.heads


@dataclass(frozen=True)
class Mixture:
    """What a mixture of experts has beside the sizes of a shape, whose intermediate size is an expert's.

    Attributes:
        top_k: experts that a row is routed to.
        dense: intermediate size of the first layers, which have no experts; *num_dense* of them.
        shared: experts that every row passes. With them, the mixture is one of DeepSeek's kind: sigmoids, groups.
    """

    experts: int
    top_k: int
    shared: int = 0
    num_dense: int = 0
    dense: int = 0
    groups: int = 1
    top_groups: int = 1


SHAPES = {
    "tiny": Shape(512, 768, 6, 8, 4, 2048),
    "3B": Shape(3072, 8192, 28, 24, 8, 128256),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),
    "405B": Shape(16384, 53248, 126, 128, 8, 128256),
}
MIXTURES = {
    "tiny-moe": (Shape(256, 512, 5, 8, 4, 1200), Mixture(8, 2)),
    "tiny-deepseek": (Shape(256, 512, 6, 8, 4, 1200), Mixture(16, 4, 1, 2, 768, 4, 2)),
    "Mixtral-8x7B": (Shape(4096, 14336, 32, 32, 8, 32000), Mixture(8, 2)),
    "Qwen3-30B-A3B": (Shape(2048, 768, 48, 32, 4, 151936, head=128), Mixture(128, 8)),
    "DeepSeek-V3": (Shape(7168, 2048, 61, 128, 8, 129280, head=128), Mixture(256, 8, 1, 3, 18432, 8, 4)),
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
    if (new.hidden % new.heads and not new.head) or new.heads % new.kv_heads or new.head_dim % old.head_dim:
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
            yield layer, self._feed_forward(layer)
        yield None, {"model.norm.weight": self._norm("model.norm.weight")}
        if not self._new.tied:
            name = "lm_head.weight"
            yield None, {name: self._vocabulary(name if name in self._weights else "model.embed_tokens.weight")}

    def _feed_forward(self, layer: int) -> Tensors:
        return self._mlp(layer, self._new.intermediate)

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

    def _mlp(self, layer: int, intermediate: int) -> Tensors:
        """The norm before it, and an MLP of *intermediate* neurons."""
        old, new, prefix = self._old, self._new, f"model.layers.{layer}."
        tensors = {
            prefix + "post_attention_layernorm.weight": self._norm(prefix + "post_attention_layernorm.weight"),
            prefix + "mlp.gate_proj.weight": self._noise(intermediate, new.hidden),
            prefix + "mlp.up_proj.weight": self._noise(intermediate, new.hidden),
            prefix + "mlp.down_proj.weight": torch.zeros(new.hidden, intermediate, dtype=self._dtype),
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


class MixtureGrower(Grower):
    """The same with experts: each a copy of the layer's MLP.

    Args:
        routers: for each of the reader's layers, and for those that are added, the router's weights ``(experts,
            hidden size of the reader)``.
    """

    def __init__(
        self,
        weights: Tensors,
        config: dict,
        new: Shape,
        dtype: torch.dtype,
        mixture: Mixture,
        routers: Callable[[int], torch.Tensor],
    ) -> None:
        super().__init__(weights, config, new, dtype)
        self._mixture = mixture
        self._routers = routers

    def _feed_forward(self, layer: int) -> Tensors:
        mixture, new = self._mixture, self._new
        if layer < mixture.num_dense:
            return self._mlp(layer, mixture.dense)
        made = self._mlp(layer, new.intermediate)
        prefix = f"model.layers.{layer}."
        norm = prefix + "post_attention_layernorm.weight"
        of_mlp = {name: made[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        tensors = {norm: made[norm]}
        block = prefix + ("mlp." if mixture.shared else "block_sparse_moe.")
        router = torch.zeros(mixture.experts, new.hidden, dtype=self._dtype)
        router[:, : self._old.hidden] = self._routers(layer).to(self._dtype)
        tensors[block + "gate.weight"] = router
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        if mixture.shared:
            tensors[block + "gate.e_score_correction_bias"] = torch.zeros(mixture.experts)
            width = mixture.shared * new.intermediate
            for name in ("gate", "up"):
                tensors[f"{block}shared_experts.{name}_proj.weight"] = self._noise(width, new.hidden)
            tensors[f"{block}shared_experts.down_proj.weight"] = torch.zeros(new.hidden, width, dtype=self._dtype)
        else:
            names = {"gate": "w1", "up": "w3", "down": "w2"}
        for expert in range(mixture.experts):
            for name, tensor in of_mlp.items():
                tensors[f"{block}experts.{expert}.{names[name]}.weight"] = tensor
        return tensors


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
            packed: Tensors = {}
            known: dict[int, list[torch.Tensor]] = {}  # experts of a layer are the same tensors
            for name, tensor in part.items():
                packed |= self._packed(name, tensor, known)
            if layer == self._grower.num_old_layers:
                self._added.append(packed)
            if layer is None and self._added and "model.norm.weight" in packed:
                yield from self._more_layers()
            yield packed

    def _packed(self, name: str, tensor: torch.Tensor, known: dict[int, list[torch.Tensor]]) -> Tensors:
        is_linear = name.endswith(_LINEARS) and self._encoder.can(*tensor.shape)
        if not is_linear or tensor.dim() != 2:
            return {name: tensor}
        if "experts." in name and not self._encoder.format.packs_experts:
            raise ValueError(f"{self._encoder.__class__.__name__} does not pack experts: take int4")
        step = self._encoder.row_step * 16
        rows = (tensor[at : at + step] for at in range(0, len(tensor), step))
        shapes = {plane: shape for plane, _, shape in self._encoder.planes(name, tuple(tensor.shape), tensor.dtype)}
        if id(tensor) not in known:
            planes = self._encoder.encode(name, tuple(tensor.shape), tensor.dtype, rows)
            known[id(tensor)] = [torch.cat([part.reshape(-1) for part in parts]) for _, parts in planes]
        encoded = zip(shapes.items(), known[id(tensor)], strict=True)
        return {plane: values.view(shape) for (plane, shape), values in encoded}

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


def grow_config(config: dict, new: Shape, dtype_name: str, mixture: Mixture | None = None) -> dict:
    """The reader's config.json with the sizes of *new*."""
    grown = config | {
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
    if mixture is None:
        return grown
    grown["num_experts_per_tok"] = mixture.top_k
    if not mixture.shared:
        return grown | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": mixture.experts,
        }
    return grown | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": mixture.experts,
        "n_shared_experts": mixture.shared,
        "n_group": mixture.groups,
        "topk_group": mixture.top_groups,
        "first_k_dense_replace": mixture.num_dense,
        "intermediate_size": mixture.dense,
        "moe_intermediate_size": new.intermediate,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 1.0,
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": 1.0},
        "use_qk_norm": False,
    }


def grow(
    shape: Shape,
    out: Path,
    dtype: str = "bf16",
    reader: Path = READER,
    report: Callable[[str], None] = lambda line: None,
    quantization: str | None = None,
    mixture: Mixture | None = None,
    skew: float = 0.0,
) -> Path:
    """Write the grown model to the folder *out* and return it.

    Args:
        mixture: make it one of experts.
        skew: of the routers: 0 sends rows anywhere, 1 to the i-th most popular expert 1 / i as often as to the first.
        dtype: ``"bf16"`` or ``"fp32"``.
        quantization: of Linears: ``"nf4"``, ``"int8"``, ``"int4"``.
        reader: folder of the model to grow.
        report: called with a line for each file written.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((reader / "config.json").read_text())
    weights = load_file(reader / "model.safetensors")
    if mixture is None:
        grower = Grower(weights, config, shape, DTYPES[dtype])
    else:
        routers = Routers(reader, mixture.experts, skew)
        grower = MixtureGrower(weights, config, shape, DTYPES[dtype], mixture, routers.weights)
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
    grown = grow_config(config, shape, dtype, mixture)
    if packer is not None:
        grown["quantization_config"] = packer.config
    (out / "config.json").write_text(json.dumps(grown, indent=2))
    for name in _COPIED:
        if (reader / name).exists():
            shutil.copyfile(reader / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quantization", choices=("nf4", "int8", "int4"))
    parser.add_argument("--reader", type=Path, default=READER)
    parser.add_argument("--layers", type=int, help="fewer or more of them than the shape has")
    parser.add_argument("--skew", type=float, default=0.0, help="of a mixture's routers: an exponent of Zipf's law")
    options = parser.parse_args()
    if options.shape in MIXTURES:
        shape, mixture = MIXTURES[options.shape]
    else:
        shape, mixture = parse_shape(options.shape), None
    if options.layers:
        shape = replace(shape, layers=options.layers)
    grow(shape, options.out, options.dtype, options.reader, print, options.quantization, mixture, skew=options.skew)


if __name__ == "__main__":
    main()
