"""What quantised weights cost in answers: the bundled reader in every format, on held-out questions.

    python -m benchmarks.accuracy [--samples 4]

An answer is right if greedy decoding writes exactly it. Beside it the divergence of the distributions of every token of
the answers from those of the model in bfloat16 (Kullback-Leibler, in millinats). The weights of a format are decoded
and computed with by plain transformers; ``bitsandbytes' own`` is transformers with bitsandbytes, which loads the folder
that was packed here. Formats leave out what does not fill their blocks: int4 the keys and values of this reader (96
rows), and llama.cpp's K types all of it (192 columns), so they are not here.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from layerstream.checkpoint.codecs.ggml import Ggml
from layerstream.checkpoint.folder import open_folder
from layerstream.checkpoint.hub import locate
from layerstream.comparing.weights import FolderWeights
from layerstream.setup.pack import pack

from benchmarks import bench
from benchmarks.reader.evaluate import FACT_COUNTS
from benchmarks.reader.prompts import WRAPPERS, draw_sample
from benchmarks.reader.tokenizer import encode

PACKED = ("int8", "nf4", "int4")
GGUF_KINDS = ("Q8_0", "Q4_0", "Q4_1")


def main() -> None:
    """Judge every format; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10, help="contexts per wrapper and number of facts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = locate("demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    questions = draw(tokenizer, options.samples)
    reference, right = answer(_plain(source), questions)
    result: dict[str, Any] = {"questions": len(right), "bf16": {"right": sum(right) / len(right)}}
    with tempfile.TemporaryDirectory() as folder:
        models = _models(source, Path(folder))
        for name, make in models.items():
            found, right_there = answer(make(), questions)
            divergence = [_divergence(own, other) for own, other in zip(reference, found, strict=True)]
            result[name] = {
                "right": sum(right_there) / len(right_there),
                "as_bf16": sum(a == b for a, b in zip(right, right_there, strict=True)) / len(right),
                "kl": sum(divergence) / len(divergence),
            }
    rows = []
    for name, values in result.items():
        if isinstance(values, dict):
            points = 100 * (values["right"] - result["bf16"]["right"])
            divergence = f"{1000 * values['kl']:.2f}" if "kl" in values else ""
            rows.append([name, f"{values['right']:.1%}", f"{points:+.1f}", divergence])
    bench.show(
        f"The bundled reader, {len(right)} held-out questions",
        ["weights", "exactly right", "points from bf16", "KL, millinats"],
        rows,
    )
    print("written to", bench.save("accuracy", result, options.json))


Question = tuple[list[int], int]
"""Token ids, and how many of them at the end are the answer."""


def draw(tokenizer: Any, num_samples: int) -> list[Question]:
    """Every question of held-out contexts, with what precedes it."""
    questions = []
    for wrapper in WRAPPERS:
        for num_facts in FACT_COUNTS:
            for index in range(num_samples):
                sample = draw_sample(random.Random(f"quantised, {wrapper}, {num_facts}, {index}"), num_facts, wrapper)
                ids, _ = encode(sample, tokenizer)
                at = 0
                for text, is_answer in sample.pieces:
                    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                    at += length
                    if is_answer:
                        questions.append((ids[:at], length))
    return questions


@torch.inference_mode()
def answer(model: Any, questions: list[Question]) -> tuple[list[torch.Tensor], list[bool]]:
    """Log-probabilities ``(answer, vocabulary)`` at each answer, and whether greedy decoding writes it."""
    found, right = [], []
    for ids, length in questions:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -length - 1 : -1].float()
        found.append(logits.log_softmax(-1))
        right.append(logits.argmax(-1).tolist() == ids[-length:])
    return found, right


def _divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def _plain(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def _models(source: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    for kind in PACKED:
        pack(source, folder / kind, kind)

    def with_values(values: dict[str, torch.Tensor]) -> Any:
        model = _plain(source)
        with torch.no_grad():
            for name, matrix in values.items():
                model.get_parameter(name).copy_(matrix)
        return model

    models: dict[str, Callable[[], Any]] = {
        kind: lambda kind=kind: with_values(decoded(folder / kind)) for kind in PACKED
    }
    models["nf4, bitsandbytes' own"] = lambda: _plain(folder / "nf4")
    for name in GGUF_KINDS:
        models[f"GGUF {name}"] = lambda name=name: with_values(_through_gguf(_plain(source), name))
    return models


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed matrix of *folder*, decoded in fp32."""
    checkpoint = open_folder(folder)
    return FolderWeights(checkpoint).read(checkpoint.packed.keys())


def _through_gguf(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The Linears of *model* in a GGUF type, quantised by the gguf package."""
    kind = gguf.GGMLQuantizationType[name]
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            blocks = torch.from_numpy(gguf.quants.quantize(module.weight.data.float().numpy(), kind))
            values = torch.empty(module.weight.shape)
            Ggml(kind).decode({"weight": blocks}, 0, values)
            found[f"{path}.weight"] = values
    return found


if __name__ == "__main__":
    main()
