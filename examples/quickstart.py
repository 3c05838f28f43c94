"""The shortest useful program: a question, a context, an answer."""

from layerstream import LayerStream, SamplingParams

PROMPT = """Context:
Brenvik was founded in 1921. Brenvik is led by Sluba Merkast. Brenvik is located in Tredry.

Question: Who leads Brenvik?
Answer:"""

# "demo" is the bundled reader. A folder or a hub id works the same way, with memory="3GiB" if the model does not fit.
with LayerStream("demo") as engine:
    completion = engine.generate(PROMPT, SamplingParams(max_tokens=16))[0]
    print(completion.text.strip())
    print(f"{completion.usage.prompt_tokens} + {completion.usage.completion_tokens} tokens,", end=" ")
    print(f"{completion.metrics.sweeps} sweeps, finished because of {completion.finish_reason!r}")
