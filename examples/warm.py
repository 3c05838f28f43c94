"""A document is computed once: warmed ahead of questions, kept on disk, found again by another engine."""

import tempfile

from layerstream import KVStoreConfig, LayerStream, SamplingParams

DOCUMENT = """Brenvik was founded in 1921. Brenvik is led by Sluba Merkast. Brenvik is located in Tredry.
Gukrand is located in Thaskin. Gukrand was founded in 1952. Gukrand is led by Thura Plasner.
Krane Lukofy works in room A-411. Krane Lukofy comes from Sviabox. Hokil Prastend works in room C-207.
Project Frostag was ordered by Pretri Brothers.
Project Frostag is due in May 2047. Tolmund Varek works in room B-120."""
PROMPT = "Context:\n{context}\n\nQuestion: {question}\nAnswer:"

with tempfile.TemporaryDirectory() as folder:
    store = KVStoreConfig(folder, load="always")  # without it: the user's cache folder, and whichever is faster
    with LayerStream("demo", kv_store=store) as engine:
        report = engine.warm([DOCUMENT], prompt=PROMPT, chat_template=False)
        print(f"{report.computed_tokens} tokens computed ahead")
    with LayerStream("demo", kv_store=store) as engine:
        for question in ("Who leads Brenvik?", "In which town is Gukrand?"):
            prompt = PROMPT.format(context=DOCUMENT, question=question)
            completion = engine.generate(prompt, SamplingParams(max_tokens=16))[0]
            usage = completion.usage
            print(f"{question} {completion.text.strip()}")
            print(f"  {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were there")
