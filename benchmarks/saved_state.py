"""llama.cpp's saved state beside our store: the same context after a restart, and after other weights.

    python -m benchmarks.saved_state --environments FOLDER --gguf FILE [--context 4096] [--cgroup 3GiB]

Runs in the environment of ``benchmarks.peers`` that has llama-cpp-python. One process computes the context and saves
its state to a file, a second one loads it and answers a question of 64 tokens; a third one loads it with other weights
under the same name, and says whether it was noticed. ``benchmarks.prefix`` measures the same work with LayerStream.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.prefix import QUESTION_TOKENS, draw

PROGRAM = """
import json, pickle, sys, time
from llama_cpp import Llama
model, state, mode, length = sys.argv[1:5]
context, question = json.loads(sys.argv[5]), json.loads(sys.argv[6])
llama = Llama(model, n_ctx=int(length) + 256, n_batch=512, use_mmap=True, verbose=False, logits_all=False)
started = time.perf_counter()
found = {}
if mode == "save":
    llama.eval(context)
    found["context_seconds"] = time.perf_counter() - started
    saved = llama.save_state()
    with open(state, "wb") as file:
        pickle.dump(saved, file)
    found["save_seconds"] = time.perf_counter() - started - found["context_seconds"]
else:
    with open(state, "rb") as file:
        llama.load_state(pickle.load(file))
    found["load_seconds"] = time.perf_counter() - started
llama.eval(question)
token = llama.sample(temp=0.0)
found["first_token_seconds"] = time.perf_counter() - started
found["token"] = int(token)
print(json.dumps(found))
"""


def main() -> None:
    """Save, restore, restore over other weights; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    python = options.environments / "llama" / "bin" / "python"
    context, question = draw(options.context, options.context), draw(QUESTION_TOKENS, 1)
    with tempfile.TemporaryDirectory(dir=options.gguf.parent) as name:
        model, state = Path(name) / "model.gguf", Path(name) / "state"
        model.hardlink_to(options.gguf)

        def run(mode: str) -> dict[str, Any]:
            bench.drop_file_cache(Path(name))
            arguments = [str(model), str(state), mode, str(options.context), json.dumps(context), json.dumps(question)]
            return bench.run_child([str(python), "-c", PROGRAM, *arguments], options.cgroup)

        parts = {"cold": run("save"), "state_bytes": state.stat().st_size, "warm": run("load")}
        model.unlink()
        shutil.copy(options.gguf, model)
        with open(model, "r+b") as file:  # other weights under the same name and size
            file.seek(model.stat().st_size // 2)
            block = bytearray(file.read(64 * 2**20))
            file.seek(model.stat().st_size // 2)
            file.write(bytes(reversed(block)))
        parts["swapped"] = run("load")
    cold, warm, swapped = parts["cold"], parts["warm"], parts["swapped"]
    bench.show(
        f"llama.cpp, saved state, context of {options.context} tokens",
        ["", "context, s", "save or load, s", "first token, s"],
        [
            ["cold", *(f"{cold[name]:.1f}" for name in ("context_seconds", "save_seconds", "first_token_seconds"))],
            ["after a restart", "-", *(f"{warm[name]:.1f}" for name in ("load_seconds", "first_token_seconds"))],
            ["other weights", "-", f"{swapped['load_seconds']:.1f}", "taken, unnoticed"],
        ],
        f"the state has {bench.gib(parts['state_bytes'])}",
    )
    print("written to", bench.save("saved_state", parts, options.json))


if __name__ == "__main__":
    main()
