"""An answer in a given form: what the form leaves no choice about takes no pass over the model.

Needs ``pip install 'layerstream[guided]'``.
"""

import json

from layerstream import LayerStream, SamplingParams

CONTEXT = "Brenvik was founded in 1921. Brenvik is led by Sluba Merkast. Gukrand is located in Thaskin."
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["Brenvik", "Gukrand"]},
        "founded": {"type": "integer", "minimum": 1000, "maximum": 2099},
    },
    "required": ["unit", "founded"],
    "additionalProperties": False,
}

with LayerStream("demo") as engine:
    prompt = f"Context:\n{CONTEXT}\n\nQuestion: Who leads Brenvik?\nAnswer:"
    choice = {"type": "choice", "choices": [" Sluba Merkast", " Tolmund Varek"]}
    print(engine.generate(prompt, SamplingParams(response_format=choice))[0].text.strip())

    completion = engine.generate(prompt, SamplingParams(response_format={"type": "json_schema", "schema": SCHEMA}))[0]
    metrics = completion.metrics
    print(sorted(json.loads(completion.text)))
    print(f"{len(completion.token_ids)} tokens, {metrics.forced_tokens} of them forced, in {metrics.sweeps} sweeps")
