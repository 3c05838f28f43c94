"""LayerStream. usage: run_layerstream.py MODEL MEMORY PROMPT_TOKENS NEW_TOKENS [SPECULATION]"""

import sys

from clock import Clock, prompt_ids
from layerstream import LayerStream, SamplingParams

model_path, memory, num_prompt, num_new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
clock = Clock()
speculation = sys.argv[5] if len(sys.argv) > 5 else "auto"
with LayerStream(model_path, memory=memory, kv_store=None, speculation=speculation, progress=False) as engine:
    clock.ready()
    clock.put("prompt")
    for delta in engine.stream(
        prompt_ids(num_prompt), SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    ):
        for token_id in delta.token_ids:
            clock.put(token_id)
clock.report()
