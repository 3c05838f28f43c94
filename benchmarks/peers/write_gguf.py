"""Writes a Llama, Mixtral or Qwen3.5 (dense) checkpoint in bf16 as GGUF, without a tokenizer (benchmarks pass ids).

usage: write_gguf.py MODEL OUT. One matrix is in memory at a time. What llama.cpp wants otherwise than a checkpoint:

- Llama, Mixtral: it rotates neighbouring pairs where transformers rotates halves, so the rows of q and k are
  interleaved, head by head. Experts, one by another in a checkpoint, are stacked.
- Qwen3.5: a norm's weight is added to 1 beforehand, but for that behind the recurrence. The decay is stored as
  ``-exp(A_log)``. A checkpoint has the value heads of a key head beside each other; llama.cpp wants the first of every
  key head, then the second of every one, and so on (conversion/qwen.py of its sources).
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
HYBRID_NAMES = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
}
HYBRID_VECTORS = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


@dataclass
class Output:
    """A tensor of the GGUF: its values as bf16 in uint16, made when they are written.

    Those kept in fp32 are ``then`` changed.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    then: Callable[[np.ndarray], np.ndarray] = np.asarray

    @property
    def is_fp32(self) -> bool:
        """Norms, routers and convolutions are kept so."""
        return len(self.shape) == 1 or "ffn_gate_inp" in self.name or "ssm_conv1d" in self.name


def main(folder: Path, out: Path) -> None:
    """Write *folder*'s model to *out*."""
    config = json.loads((folder / "config.json").read_text())
    is_hybrid = config["model_type"] == "qwen3_5_text"
    writer = gguf.GGUFWriter(out, "qwen35" if is_hybrid else "llama")
    add_sizes(writer, config)
    if is_hybrid:
        add_recurrent_sizes(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    made = list(hybrid_outputs(folder, config) if is_hybrid else outputs(folder, config))
    for output in made:
        size = int(np.prod(output.shape))
        if output.is_fp32:
            writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), 4 * size)
        else:
            byte_shape = (*output.shape[:-1], 2 * output.shape[-1])
            writer.add_tensor_info(output.name, byte_shape, np.dtype(np.uint8), 2 * size, raw_dtype=BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in made:
        values = output.make()
        if output.is_fp32:
            writer.write_tensor_data(output.then((values.astype(np.uint32) << 16).view(np.float32)))
        else:
            writer.write_tensor_data(np.ascontiguousarray(values).view(np.uint8))
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: dict) -> None:
    """What every family says of its shape."""
    rope = config.get("rope_parameters") or {}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def add_recurrent_sizes(writer: gguf.GGUFWriter, config: dict) -> None:
    """What Qwen3.5 says of its recurrent layers, and of positions (three numbers for a picture's, alike for text)."""
    writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    is_recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    writer.add_array("qwen35.attention.recurrent_layers", is_recurrent)


def outputs(folder: Path, config: dict) -> Iterator[Output]:
    """What the GGUF holds of the checkpoint in *folder*."""
    experts: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name, tensor in tensors(folder):
        expert = EXPERT.fullmatch(name)
        if expert:
            layer, number, matrix = expert.groups()
            experts.setdefault((layer, matrix), {})[int(number)] = tensor
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            count = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            yield Output(renamed(name), tensor.shape, partial(interleaved, tensor, count))
        else:
            yield Output(renamed(name), tensor.shape, partial(np.asarray, tensor))
    for (layer, matrix), found in experts.items():
        stack = [found[number] for number in sorted(found)]
        assert len(stack) == config["num_local_experts"]
        name = f"blk.{layer}.{NAMES[matrix]}.weight"
        yield Output(name, (len(stack), *stack[0].shape), partial(np.stack, stack))


def hybrid_outputs(folder: Path, config: dict) -> Iterator[Output]:
    """What the GGUF holds of the Qwen3.5 checkpoint in *folder*."""
    keys, size = config["linear_num_key_heads"] * config["linear_key_head_dim"], config["linear_value_head_dim"]
    by_head = {  # rows (of out_proj: columns) before those of value heads, and how many a value head has
        "in_proj_qkv": (2 * keys, size),
        "conv1d": (2 * keys, size),
        "in_proj_z": (0, size),
        "out_proj": (0, size),
        "in_proj_a": (0, 1),
        "in_proj_b": (0, 1),
        "A_log": (0, 1),
        "dt_bias": (0, 1),
    }
    for name, stored in tensors(folder):
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        tensor = stored.squeeze(1) if part == "conv1d" else stored
        make, then = partial(np.asarray, tensor), np.asarray
        if part in by_head:
            make = partial(np.take, tensor, tiled_rows(config, *by_head[part]), axis=1 if part == "out_proj" else 0)
        if part == "A_log":
            then = minus_exp
        elif part.endswith("norm") and "linear_attn" not in name:
            then = plus_one
        yield Output(renamed(name, NAMES | HYBRID_NAMES), tensor.shape, make, then)


def tiled_rows(config: dict, num_before: int, head_size: int) -> np.ndarray:
    """The rows of a checkpoint in llama.cpp's order: the first value head of every key head, then the second ones."""
    count = config["linear_num_value_heads"] * head_size
    grouped = np.arange(count).reshape(config["linear_num_key_heads"], -1, head_size)
    return np.concatenate([np.arange(num_before), num_before + grouped.swapaxes(0, 1).ravel()])


def minus_exp(values: np.ndarray) -> np.ndarray:
    """The decay that llama.cpp multiplies by, from its logarithm."""
    return -np.exp(values)


def plus_one(values: np.ndarray) -> np.ndarray:
    """The scale of a norm whose weight is stored around 0."""
    return values + np.float32(1)


def interleaved(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of *tensor* in the order of llama.cpp's rotary embedding."""
    return tensor.reshape(num_heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, bf16 as uint16)`` of every tensor, mapped from the files."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}; this writer takes bf16"
                first, last = entry["data_offsets"]
                yield name, np.frombuffer(data[start + first : start + last], "<u2").reshape(entry["shape"])


def renamed(name: str, names: Mapping[str, str] = NAMES) -> str:
    """The name in GGUF of a tensor that is no expert's."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    if rest in HYBRID_VECTORS:
        return f"blk.{layer}.{HYBRID_VECTORS[rest]}"
    module = rest.removesuffix(".weight")
    return f"blk.{layer}.{names[module]}.weight"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
