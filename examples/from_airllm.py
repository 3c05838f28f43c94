"""The program of AirLLM's README; only the import and the model are others."""

from layerstream import AutoModel

MAX_LENGTH = 128
model = AutoModel.from_pretrained("demo")

input_text = [
    "Context:\nBrenvik is led by Sluba Merkast. Brenvik is located in Tredry.\n\nQuestion: Who leads Brenvik?\nAnswer:"
]

input_tokens = model.tokenizer(
    input_text,
    return_tensors="pt",
    return_attention_mask=False,
    truncation=True,
    max_length=MAX_LENGTH,
    padding=False,
)

generation_output = model.generate(
    input_tokens["input_ids"],
    max_new_tokens=20,
    use_cache=True,
    return_dict_in_generate=True,
)

output = model.tokenizer.decode(generation_output.sequences[0], skip_special_tokens=True)
print(output)
