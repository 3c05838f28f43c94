"""Text as it comes, and an answer given up halfway."""

from layerstream import LayerStream, SamplingParams

PROMPT = """Context:
The Tolmar Archive keeps its files on shelf XN2547 and welcomes visitors from 9:15 to 16:30.

Question: What are the opening hours of Tolmar Archive?
Answer:"""

with LayerStream("demo") as engine:
    for delta in engine.stream(PROMPT, SamplingParams(max_tokens=16)):
        print(delta.text, end="", flush=True)
    print()

    request = engine.submit(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    for number, _ in enumerate(request):
        if number == 3:
            request.cancel()  # by the next sweep it is gone
    print(f"cancelled after {request.result().usage.completion_tokens} tokens: {request.result().finish_reason}")
