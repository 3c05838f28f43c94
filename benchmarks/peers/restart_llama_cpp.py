"""llama.cpp, mmap: a context and a question about it. usage: restart_llama_cpp.py GGUF WORKLOAD cold|new|restored STATE

Three processes, of which each answers the same question:

- ``cold`` computes the context, then tokens after it one by one, then the question behind a copy of the context's
  sequence. That is prefix reuse at the best that the library can do, and free; a recurrent state can only be copied,
  not cut. At the end it saves the context's sequence to STATE.
- ``new`` has nothing of that and computes the context with the question in one batch.
- ``restored`` loads STATE.

Weights are computed with as they are mapped (see run_llama_cpp.py).
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp as lib
import numpy as np

gguf, workload_file, part, state = sys.argv[1:]
workload = json.loads(Path(workload_file).read_text())
context_ids, question_ids = workload["context"], workload["question"]
FIRST, ANSWER, QUESTION = range(3)  # sequences: the context's own, and two that begin as copies of it
found: dict[str, object] = {}


class Model:
    """A model with three sequences in one cache."""

    def __init__(self) -> None:
        params = lib.llama_model_default_params()
        params.use_mmap, params.use_extra_bufts = True, False
        model = lib.llama_model_load_from_file(gguf.encode(), params)
        self._num_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        longest = len(context_ids) + len(question_ids)
        params = lib.llama_context_default_params()
        params.n_ctx = (longest + workload["new_tokens"] + len(question_ids) + 256) // 256 * 256
        params.n_batch = params.n_ubatch = longest  # a prompt is one pass over the weights
        params.n_seq_max, params.kv_unified = 3, True
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = lib.llama_init_from_model(model, params)
        self._batch = lib.llama_batch_init(longest, 0, 1)

    def decode(self, ids: list[int], start: int, sequence: int) -> int:
        """Compute *ids* from position *start* of *sequence*; the likeliest next token."""
        self._batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            self._batch.token[index], self._batch.pos[index] = token, start + index
            self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, sequence
            self._batch.logits[index] = index == len(ids) - 1
        if lib.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode failed")
        logits = lib.llama_get_logits_ith(self._context, len(ids) - 1)
        return int(np.ctypeslib.as_array(logits, (self._num_tokens,)).argmax())

    def copy(self, sequence: int) -> None:
        """Begin *sequence* as the context's."""
        lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), FIRST, sequence, -1, -1)

    def save(self) -> None:
        """Write the context's sequence to the state file."""
        ids = (lib.llama_token * len(context_ids))(*context_ids)
        if not lib.llama_state_seq_save_file(self._context, state.encode(), FIRST, ids, len(ids)):
            raise RuntimeError("the state was not saved")

    def load(self) -> None:
        """Read the context's sequence from the state file."""
        ids, count = (lib.llama_token * len(context_ids))(), ctypes.c_size_t()
        if not lib.llama_state_seq_load_file(self._context, state.encode(), FIRST, ids, len(ids), ctypes.byref(count)):
            raise RuntimeError("the state was not loaded")
        if list(ids) != context_ids:
            raise RuntimeError("the state is another context's")


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Note under *name* how many seconds it took."""
    started = time.perf_counter()
    yield
    found[name] = time.perf_counter() - started


def cold() -> None:
    """The context, tokens after it, and the question behind a copy of it."""
    with timed("first_token_seconds"):
        token = model.decode(context_ids, 0, FIRST)
    tokens, seconds = [token], []
    model.copy(ANSWER)
    for number in range(workload["new_tokens"]):
        started = time.perf_counter()
        tokens.append(model.decode(tokens[-1:], len(context_ids) + number, ANSWER))
        seconds.append(time.perf_counter() - started)
    found.update(token_ids=tokens, token_seconds=seconds)
    with timed("question_seconds"):
        model.copy(QUESTION)
        found["question_token"] = model.decode(question_ids, len(context_ids), QUESTION)
    with timed("save_seconds"):
        model.save()
    found["state_bytes"] = Path(state).stat().st_size


quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, ctypes.c_void_p())
with timed("open_seconds"):
    model = Model()
if part == "cold":
    cold()
elif part == "new":
    with timed("question_seconds"):
        found["question_token"] = model.decode(context_ids + question_ids, 0, FIRST)
else:
    with timed("question_seconds"):
        model.load()
        found["question_token"] = model.decode(question_ids, len(context_ids), FIRST)
print("\n" + json.dumps(found), flush=True)
