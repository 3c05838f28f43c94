"""Several questions at once: they travel in the same sweeps, so together they cost little more than one."""

from layerstream import LayerStream, SamplingParams

CONTEXT = """Brenvik is led by Sluba Merkast. Brenvik is located in Tredry.
Gukrand is located in Thaskin. Gukrand was founded in 1952.
Krane Lukofy works in room A-411."""
QUESTIONS = ["Who leads Brenvik?", "In which town is Gukrand?", "Since when has Gukrand existed?"]

with LayerStream("demo") as engine:
    prompts = [f"Context:\n{CONTEXT}\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]
    completions = engine.generate(prompts, SamplingParams(max_tokens=16))
    for question, completion in zip(QUESTIONS, completions, strict=True):
        print(f"{question} {completion.text.strip()}")
    alone = sum(completion.metrics.sweeps for completion in completions)
    print(f"{engine.stats().sweeps} sweeps; one after the other it would have been {alone}")
