"""llama.cpp with mmap: a prompt of 512 tokens, then decoding of one sequence and of eight at once, greedy.

usage: decode_llama_cpp.py [--as-stored] GGUF PROMPT_TOKENS NEW_TOKENS BATCH...

By default llama.cpp writes Q4_0 to memory in another layout; with --as-stored it maps the file, as it must where the
weights do not fit.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp as lib
import numpy as np

as_stored = sys.argv[1] == "--as-stored"
path, *numbers = sys.argv[1 + as_stored :]
num_prompt, num_new, *batches = map(int, numbers)
quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, ctypes.c_void_p())
lib.llama_backend_init()
model_params = lib.llama_model_default_params()
model_params.use_extra_bufts = not as_stored
model = lib.llama_model_load_from_file(path.encode(), model_params)
size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))


def open_context(batch: int) -> object:
    """A context for *batch* sequences."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024, 512, 512, batch
    params.n_threads = params.n_threads_batch = os.cpu_count()
    return lib.llama_init_from_model(model, params)


def decode(context: object, items: list[tuple[int, int, int, bool]]) -> list[int]:
    """Compute *items* ``(token, position, sequence, wanted)``; the likeliest next token of those wanted."""
    batch = lib.llama_batch_init(len(items), 0, 1)
    batch.n_tokens = len(items)
    for index, (token, position, sequence, wanted) in enumerate(items):
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
    assert lib.llama_decode(context, batch) == 0
    rows = [index for index, item in enumerate(items) if item[3]]
    found = [int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), shape=(size,)).argmax()) for row in rows]
    lib.llama_batch_free(batch)
    return found


def prompt(number: int, length: int) -> list[int]:
    """Token ids that any vocabulary of a thousand has; no two prompts begin alike."""
    return [5 + (number + at) % 900 for at in range(length)]


firsts = []
context = open_context(1)
for number in range(3):
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    started = time.perf_counter()
    decode(context, [(t, at, 0, at == num_prompt - 1) for at, t in enumerate(prompt(number, num_prompt))])
    firsts.append(time.perf_counter() - started)
lib.llama_free(context)
steps: dict[int, list[float]] = {}
for batch in batches:
    context = open_context(batch)
    items = [(t, at, s, at == 7) for s in range(batch) for at, t in enumerate(prompt(100 + s, 8))]
    tokens = decode(context, items)
    steps[batch] = []
    for step in range(num_new):
        started = time.perf_counter()
        tokens = decode(context, [(token, 8 + step, s, True) for s, token in enumerate(tokens)])
        steps[batch].append(time.perf_counter() - started)
    lib.llama_free(context)
print("\n" + json.dumps({"first_seconds": firsts, "step_seconds": steps}), flush=True)
