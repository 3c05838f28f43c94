"""Writes a Llama or Mixtral checkpoint in bf16 as GGUF, without a tokenizer (the benchmark passes ids).

usage: write_gguf.py MODEL OUT. llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of
q and k are interleaved, head by head. Experts, one by another in a checkpoint, are stacked. One matrix is in memory at
a time.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
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
EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


@dataclass
class Output:
    """A tensor of the GGUF: its values as bf16 in uint16, made when they are written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def is_fp32(self) -> bool:
        """Norms and routers are kept so."""
        return len(self.shape) == 1 or "ffn_gate_inp" in self.name


def main(folder: Path, out: Path) -> None:
    """Write *folder*'s model to *out*."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    made = list(outputs(folder, config))
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
            writer.write_tensor_data((values.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.write_tensor_data(np.ascontiguousarray(values).view(np.uint8))
    writer.close()


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


def renamed(name: str) -> str:
    """The name in GGUF of a tensor that is no expert's."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
