"""From the metadata of a GGUF file to transformers' config of the model in it."""

from __future__ import annotations

from typing import Any

import transformers

from layerstream.checkpoint.config import check_config
from layerstream.checkpoint.gguf import ROPE_FACTORS, GgufFile, read_floats
from layerstream.checkpoint.gguf_architectures import Architecture, Fields, architecture_of
from layerstream.checkpoint.reading import explained
from layerstream.errors import InvalidHeader, UnsupportedModel

_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
}
_MEANINGFUL = frozenset(
    """
    attention.clamp_kqv attention.scale attention.temperature_length attention.temperature_scale attn_logit_softcapping
    embedding_scale final_logit_softcapping logit_scale residual_scale rope.dimension_sections router_logit_softcapping
    """.split()
)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def read_gguf_config(file: GgufFile) -> Any:
    """The config of the model in *file*.

    Raises:
        UnsupportedModel: an architecture, or a kind of rotary scaling, that is not read.
        InvalidHeader: the metadata do not say what a model needs, or what no model can have.
    """
    fields = config_fields(file, architecture_of(file))
    check_config(fields, str(file.path), [tensor.shape for tensor in file.tensors.values()])
    family = fields.pop("model_type")
    with explained(f"{file.path}: transformers refuses what its metadata say"):
        return transformers.CONFIG_MAPPING[family](**fields)


def config_fields(file: GgufFile, row: Architecture) -> Fields:
    """What the metadata say, by the names of the config's fields."""
    fields: Fields = {"model_type": row.family, **row.taken}
    fields["num_hidden_layers"] = num_layers(file)
    for name, key in {**_KEYS, **row.keys}.items():
        if (value := file.said(key)) is not None:
            fields[name] = value
    for name in ("hidden_size", "num_attention_heads"):
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise InvalidHeader(f"{file.path}: its metadata say {_KEYS[name]} is {fields.get(name)}; fetch it again")
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    embedding = file.tensors.get("token_embd.weight")
    fields["vocab_size"] = 0 if embedding is None else embedding.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields |= {name: f"blk.0.{tensor}" in file.tensors for name, tensor in row.flags.items()}
    fields |= _windows(file, row, fields) | _tokens(file)
    fields["rope_parameters"] = _rope(file, row, fields)
    fields |= row.derive(file, fields)
    _check_all_read(file, row)
    return fields


def _check_all_read(file: GgufFile, row: Architecture) -> None:
    """Nothing that changes what the model computes is said, and not read.

    Raises:
        UnsupportedModel: names it.
    """
    for key in _MEANINGFUL - file.asked - row.neutral:
        value = file.metadata.get(f"{file.architecture}.{key}")
        if any(item not in {0, 1, None} for item in (value if isinstance(value, list) else [value])):
            raise UnsupportedModel(
                f"{file.path}: its metadata say {key} is {value!s:.80}, which is not read of architecture "
                f"{file.architecture!r}; use the safetensors original"
            )


def num_layers(file: GgufFile) -> int:
    """Of the model; blocks that predict further tokens come after them.

    Raises:
        InvalidHeader: the metadata do not say.
    """
    count = file.said("block_count")
    if not isinstance(count, int):
        raise InvalidHeader(f"{file.path}: its metadata have no {file.architecture}.block_count; fetch it again")
    return count - int(file.said("nextn_predict_layers", 0))


def _windows(file: GgufFile, row: Architecture, fields: Fields) -> Fields:
    """Which layers attend within a window; 0 stands for none."""
    window = fields.get("sliding_window", fields.get("attention_chunk_size")) or None
    if not row.period:
        return {"sliding_window": window}
    layers = range(fields["num_hidden_layers"])
    pattern = file.metadata.get(f"{file.architecture}.attention.sliding_window_pattern", row.period)
    if isinstance(pattern, list) and len(pattern) < len(layers):
        raise InvalidHeader(
            f"{file.path}: sliding_window_pattern is of {len(pattern)} layers; expected {len(layers)}; fetch it again"
        )
    is_local = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in layers]
    kinds = [row.local if window and is_local[layer] else "full_attention" for layer in layers]
    return {"sliding_window": window, "layer_types": kinds}


def _tokens(file: GgufFile) -> Fields:
    """Special tokens: every one that ends an answer."""
    said = [file.metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    ends = list(dict.fromkeys(token for token in said if token is not None))
    return {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) if ends else None,
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope(file: GgufFile, row: Architecture, fields: Fields) -> Fields:
    """Rotary parameters, where the family has them for each kind of layer of each."""
    head_dim = fields["head_dim"]
    rotary = head_dim if row.is_latent else file.said("rope.dimension_count", head_dim)
    plain = {"rope_type": "default", "rope_theta": file.said("rope.freq_base", 10_000.0)}
    plain["partial_rotary_factor"] = rotary / head_dim
    whole = {**plain, **_scaling(file, row), **row.rope}
    if row.local_theta is None:
        return whole
    return {
        row.local: plain | {"rope_theta": file.said("rope.freq_base_swa", row.local_theta or plain["rope_theta"])},
        "full_attention": whole,
    }


def _scaling(file: GgufFile, row: Architecture) -> Fields:
    """How frequencies are scaled; by factors of their own, these are LongRoPE's, of one length (Llama 3.1) or two."""
    kind, factor = file.said("rope.scaling.type", "none"), file.said("rope.scaling.factor")
    original = file.said("rope.scaling.original_context_length")
    if (factors := file.tensors.get(ROPE_FACTORS)) is not None:
        one = read_floats(factors).tolist()
        whole = {
            "original_max_position_embeddings": file.said("context_length"),
            "factor": 1.0,
            "attention_factor": 1.0,
        }
        return {"rope_type": "longrope", "long_factor": one, "short_factor": one, **whole}
    if _LONG in file.tensors and _SHORT in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": read_floats(file.tensors[_LONG]).tolist(),
            "short_factor": read_floats(file.tensors[_SHORT]).tolist(),
            "original_max_position_embeddings": original,
        }
    if kind == "none" or (kind == "linear" and not factor):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **_yarn(file, row),
        }
    raise UnsupportedModel(
        f"{file.path}: rotary positions are scaled ({kind}), and its metadata do not say all of it; use the "
        "safetensors original"
    )


def _yarn(file: GgufFile, row: Architecture) -> Fields:
    """What YaRN does beside its factor. Files of latent attention say a tenth of ``mscale_all_dim``."""
    found = {
        "beta_fast": file.said("rope.scaling.yarn_beta_fast"),
        "beta_slow": file.said("rope.scaling.yarn_beta_slow"),
        "attention_factor": file.said("rope.scaling.yarn_attn_factor"),
    }
    if multiplier := file.said("rope.scaling.yarn_log_multiplier"):
        over_all = round(multiplier * 10, 6) if row.is_latent else multiplier
        found |= {"mscale_all_dim": over_all, "mscale": over_all if row.is_latent else 1.0}
    return {name: value for name, value in found.items() if value is not None}
