"""accelerate's disk offload through transformers.

usage: run_accelerate.py MODEL OFFLOAD_FOLDER CPU_MEMORY PROMPT_TOKENS NEW_TOKENS; CPU_MEMORY 0: all of it on disk
"""

import sys

import torch
from clock import Clock, prompt_ids
from transformers import AutoConfig, AutoModelForCausalLM

model_path, folder, memory, num_prompt, num_new = sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:6])
clock = Clock()
if memory == "0":
    names = {"model.embed_tokens": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    num_layers = AutoConfig.from_pretrained(model_path).num_hidden_layers
    device_map: object = names | {f"model.layers.{index}": "disk" for index in range(num_layers)}
    limits = None
else:
    device_map, limits = "auto", {"cpu": memory}
model = AutoModelForCausalLM.from_pretrained(
    model_path, dtype="auto", device_map=device_map, max_memory=limits, offload_folder=folder
)
clock.ready()
ids = torch.tensor([prompt_ids(num_prompt)])
model.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, streamer=clock)
clock.report()
