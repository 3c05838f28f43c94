"""AirLLM 4.0.0 on the CPU. usage: run_airllm.py MODEL SPLIT_FOLDER PROMPT_TOKENS NEW_TOKENS [nogc]

``nogc`` stubs its ``gc.collect`` after every layer, which half of its time goes to.
"""

import sys

import airllm.airllm_base
import torch
from airllm import AutoModel
from clock import Clock, prompt_ids

model_path, split_folder, num_prompt, num_new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if "nogc" in sys.argv:
    airllm.airllm_base.clean_memory = lambda: None
torch.set_num_threads(max(1, torch.get_num_threads()))
clock = Clock()
model = AutoModel.from_pretrained(model_path, device="cpu", layer_shards_saving_path=split_folder)
clock.ready()
if num_new:
    ids = torch.tensor([prompt_ids(num_prompt)])
    model.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, use_cache=True, streamer=clock)
    clock.report()
