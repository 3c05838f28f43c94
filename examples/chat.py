"""Several turns: messages go through the model's own chat template."""

from layerstream import LayerStream, SamplingParams

CONTEXT = "Brenvik was founded in 1921. Brenvik is led by Sluba Merkast. Brenvik is located in Tredry."

with LayerStream("demo") as engine:
    messages = [{"role": "user", "content": f"Context:\n{CONTEXT}\n\nQuestion: Who leads Brenvik?"}]
    for question in ("In which town is Brenvik?", "Since when has Brenvik existed?", None):
        answer = engine.generate(messages, SamplingParams(max_tokens=16))[0].text.strip()
        print(f"{messages[-1]['content'].splitlines()[-1]}\n  {answer}")
        messages.append({"role": "assistant", "content": answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
