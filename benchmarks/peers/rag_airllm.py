"""Questions through AirLLM 4.0.0 on the CPU. usage: rag_airllm.py MODEL SPLIT WORKLOAD COUNT BATCH [nogc]

BATCH questions are padded on the left and generated together; ``nogc`` stubs the ``gc.collect`` after every layer.
"""

import json
import sys
import time
from pathlib import Path

import airllm.airllm_base
import torch
from airllm import AutoModel

model_path, split_folder, workload_path, count, batch = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
workload = json.loads(Path(workload_path).read_text())
if "nogc" in sys.argv:
    airllm.airllm_base.clean_memory = lambda: None
started = time.perf_counter()
model = AutoModel.from_pretrained(model_path, device="cpu", layer_shards_saving_path=split_folder)
load_seconds = time.perf_counter() - started
end, pad = workload["end"], workload["pad"]
prompts = [question["prompt"] for question in workload["questions"][:count]]
answers = []
started = time.perf_counter()
for at in range(0, len(prompts), batch):
    some = prompts[at : at + batch]
    longest = max(map(len, some))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in some])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=workload["max_tokens"],
        do_sample=False,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=pad,
    )
    for row in found[:, longest:].tolist():
        answers.append(row[: row.index(end) + 1] if end in row else row)
seconds = time.perf_counter() - started
print("\n" + json.dumps({"load_seconds": load_seconds, "seconds": seconds, "answers": answers}), flush=True)
