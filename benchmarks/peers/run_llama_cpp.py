"""llama.cpp with mmap, through llama-cpp-python. usage: run_llama_cpp.py GGUF PROMPT_TOKENS NEW_TOKENS

Weights are computed with as they are mapped: by default llama.cpp writes Q4_0 to memory in another layout, and is
killed where there is no room for it.
"""

import os
import sys

from clock import Clock, prompt_ids
from llama_cpp import Llama
from llama_cpp import llama_cpp as lib

path, num_prompt, num_new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
make_params = lib.llama_model_default_params


def params_as_stored() -> lib.llama_model_params:
    """llama.cpp's own, but for the layout of weights in memory."""
    params = make_params()
    params.use_extra_bufts = False
    return params


lib.llama_model_default_params = params_as_stored
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
