"""What users of other libraries write out of habit, and what it is here: hints for options that are refused.

A hint is a phrase behind "here:"; ``{limit}`` is how the wrapper calls the longest answer, ``{value}`` what was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_LIMIT = "{limit}={value}"
_CONTEXT = "engine_kwargs={{'max_context': {value}}}"
_DTYPE = "engine_kwargs={{'dtype': {value}}}"
_MEMORY = "what fits the memory stays there by itself; engine_kwargs={{'memory': '6GiB'}} sets how much that is"
_MODEL = "model={value}"
_SAMPLING = "sampling options are fields of their own: temperature=0.7, {limit}=64"
_LOADING = "options of the engine go into engine_kwargs={{'memory': '6GiB'}}, sampling options are fields of their own"
_AUTOMATIC = "nothing, it is chosen for the machine"
_LOCAL = "nothing, the model runs in this process"
_NF4 = "engine_kwargs={{'quantization': 'nf4'}}"

HINTS: Mapping[str, str] = {
    # transformers, HuggingFacePipeline, HuggingFaceLLM
    "generate_kwargs": _SAMPLING,
    "generation_config": _SAMPLING,
    "pipeline_kwargs": _SAMPLING,
    "model_kwargs": _LOADING,
    "max_new_tokens": _LIMIT,
    "max_length": "{limit} counts the answer alone, without the prompt",
    "do_sample": "temperature=0 takes the most probable token, temperature=0.7 draws",
    "num_beams": "beam_width={value} in a call",
    "num_return_sequences": "n={value} in a call",
    "device_map": "engine_kwargs={{'device': 'cuda'}}, or engine_kwargs={{'device_map': 'balanced'}} for several GPUs; "
    "what does not fit streams by itself",
    "load_in_4bit": _NF4,
    "load_in_8bit": "engine_kwargs={{'quantization': 'int8'}}",
    "quantization_config": f"{_NF4}, 'int8' or 'int4'; a model that is quantised already needs nothing",
    "torch_dtype": _DTYPE,
    "attn_implementation": "engine_kwargs={{'attention': 'flash_attn'}}",
    "low_cpu_mem_usage": _AUTOMATIC,
    "offload_folder": "nothing, weights are read from where they lie",
    "tokenizer": "nothing, it is the model's own",
    "tokenizer_name": "nothing, the tokenizer is the model's own",
    "tokenizer_kwargs": "nothing, the tokenizer is the model's own",
    "model_id": _MODEL,
    "repo_id": _MODEL,
    "stopping_ids": "stop_token_ids={value} in a call",
    # llama.cpp
    "model_path": _MODEL,
    "n_ctx": _CONTEXT,
    "n_gpu_layers": _MEMORY,
    "n_batch": _AUTOMATIC,
    "n_threads": _AUTOMATIC,
    "repeat_penalty": "repetition_penalty={value}",
    "use_mmap": _AUTOMATIC,
    "use_mlock": _AUTOMATIC,
    # Ollama
    "num_ctx": _CONTEXT,
    "num_gpu": _MEMORY,
    "num_thread": _AUTOMATIC,
    "num_predict": _LIMIT,
    "keep_alive": "nothing, the model stays as long as a wrapper holds it",
    "base_url": _LOCAL,
    "format": "response_format={{'type': 'json_object'}} in a call",
    # vLLM
    "max_model_len": _CONTEXT,
    "gpu_memory_utilization": _MEMORY,
    "tensor_parallel_size": "engine_kwargs={{'device_map': 'balanced'}} spreads the layers over all GPUs",
    "enforce_eager": _AUTOMATIC,
    # OpenAI and LlamaIndex
    "max_tokens": _LIMIT,
    "max_completion_tokens": _LIMIT,
    "max_output_tokens": _LIMIT,
    "stop_sequences": "stop={value}",
    "n": "n={value} in a call",
    "context_window": _CONTEXT,
    "additional_kwargs": _SAMPLING,
    "extra_body": _SAMPLING,
    "openai_api_key": _LOCAL,
    "organization": _LOCAL,
}


def hint_for(name: str, value: Any, known: Iterable[str]) -> str | None:
    """What *name* is called here, for a wrapper with the fields *known*; ``None``: nobody's habit."""
    if name not in HINTS:
        return None
    return HINTS[name].format(limit="max_new_tokens" if "max_new_tokens" in known else "max_tokens", value=repr(value))
