"""Questions through llama.cpp, mmap. usage: rag_llama_cpp.py GGUF WORKLOAD COUNT single|batch empty|filled

Contexts are sequences of one KV cache, and a question's sequence begins as a copy of its context's, which costs nothing
there: prefix reuse at the best that the library can do. ``filled``: the contexts are computed before the clock starts.
``batch``: all questions are sequences of the same batches.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import llama_cpp as lib
import numpy as np

path, workload_path, count, mode, store = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
workload = json.loads(Path(workload_path).read_text())
questions, contexts = workload["questions"][:count], workload["contexts"]
BATCH = 512
FIRST = len(contexts)  # the sequences of questions come behind those of contexts


class Runner:
    def __init__(self) -> None:
        model_params = lib.llama_model_default_params()
        model_params.use_mmap = True
        self.model = lib.llama_model_load_from_file(path.encode(), model_params)
        params = lib.llama_context_default_params()
        room = sum(map(len, contexts)) + sum(len(q["prompt"]) - len(contexts[q["context"]]) + 20 for q in questions)
        params.n_ctx = (room + 511) // 256 * 256
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = FIRST + len(questions)
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.num_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """*rows* of (token, position, sequence, whether its next token is wanted); the tokens wanted, by sequence."""
        found: dict[int, int] = {}
        for at in range(0, len(rows), BATCH):
            some = rows[at : at + BATCH]
            self.batch.n_tokens = len(some)
            for index, (token, position, sequence, wanted) in enumerate(some):
                self.batch.token[index], self.batch.pos[index] = token, position
                self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
                self.batch.logits[index] = wanted
            if lib.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            for index, (_, _, sequence, wanted) in enumerate(some):
                if wanted:
                    logits = lib.llama_get_logits_ith(self.context, index)
                    address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                    found[sequence] = int(np.ctypeslib.as_array(address, (self.num_tokens,)).argmax())
        return found

    def prefill(self) -> None:
        self.run([(t, at, number, False) for number, ids in enumerate(contexts) for at, t in enumerate(ids)])

    def answer(self, numbers: list[int]) -> list[list[int]]:
        rows = []
        for number in numbers:
            question = questions[number]
            start = len(contexts[question["context"]])
            lib.llama_memory_seq_cp(self.memory, question["context"], FIRST + number, 0, start)
            own = question["prompt"][start:]
            rows += [(t, start + at, FIRST + number, at == len(own) - 1) for at, t in enumerate(own)]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        found = self.run(rows)
        while found:
            rows = []
            for sequence, token in found.items():
                own = answers[sequence - FIRST]
                own.append(token)
                if token != workload["end"] and len(own) < workload["max_tokens"]:
                    position = len(questions[sequence - FIRST]["prompt"]) + len(own) - 1
                    rows.append((token, position, sequence, True))
            found = self.run(rows)
        for number in numbers:
            lib.llama_memory_seq_rm(self.memory, FIRST + number, -1, -1)
        return [answers[number] for number in numbers]


quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, ctypes.c_void_p())
started = time.perf_counter()
runner = Runner()
load_seconds = time.perf_counter() - started
if store == "filled":
    runner.prefill()
started = time.perf_counter()
if store == "empty":
    runner.prefill()
everyone = list(range(len(questions)))
answers = runner.answer(everyone) if mode == "batch" else [runner.answer([number])[0] for number in everyone]
seconds = time.perf_counter() - started
print("\n" + json.dumps({"load_seconds": load_seconds, "seconds": seconds, "answers": answers}), flush=True)
