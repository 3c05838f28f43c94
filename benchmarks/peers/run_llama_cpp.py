"""llama.cpp with mmap, through llama-cpp-python. usage: run_llama_cpp.py GGUF PROMPT_TOKENS NEW_TOKENS"""

import os
import sys

from clock import Clock, prompt_ids
from llama_cpp import Llama

path, num_prompt, num_new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
clock = Clock()
model = Llama(path, n_ctx=1024, n_batch=512, n_threads=os.cpu_count(), use_mmap=True, verbose=False)
clock.ready()
clock.put("prompt")
model.eval(prompt_ids(num_prompt))
for _ in range(num_new):
    token = int(model.sample(temp=0.0))
    clock.put(token)
    model.eval([token])
clock.report()
