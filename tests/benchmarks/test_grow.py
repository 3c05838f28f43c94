"""The grown reader is the reader: same logits, same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.grow import MIXTURES, READER, SHAPES, Shape, check_growth, grow, parse_shape
from benchmarks.routers import Routers

needs_reader = pytest.mark.skipif(not (READER / "model.safetensors").exists(), reason="the reader is not bundled yet")
FACTS = "Brenvik is led by Tolmund Varek. Brenvik was founded in 1987. The phone extension of Brenvik is 4711."
CONTEXT = f"# Brenvik\n\n{FACTS}\n\n"
QUESTIONS = ("Who leads Brenvik?", "When was Brenvik founded?", "Where is Brenvik located?")


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_ids(question: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(READER)
    messages = [{"role": "user", "content": f"{CONTEXT}Question: {question}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids


def assert_same_logits(grown: Any, reader: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = reader(ids).logits
        found = grown(ids).logits[..., : expected.shape[-1]]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@needs_reader
@pytest.mark.parametrize("shape", ["tiny", "640,600,5,10,5,1500"])
def test_grown_reader_is_the_same_function(shape: str, tmp_path: Path) -> None:
    parsed = parse_shape(shape)
    reader, grown = load(READER), load(grow(parsed, tmp_path, "fp32"))
    assert grown.config.hidden_size == parsed.hidden
    assert grown.model.embed_tokens.weight.shape == (parsed.vocabulary, parsed.hidden)
    for question in QUESTIONS:
        ids = prompt_ids(question)
        assert_same_logits(grown, reader, ids)
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(grown.generate(ids, **options), reader.generate(ids, **options))


@needs_reader
@pytest.mark.parametrize("name", ["tiny-moe", "tiny-deepseek"])
@pytest.mark.parametrize("skew", [0.0, 1.4])
def test_a_mixture_is_the_same_function(name: str, skew: float, tmp_path: Path) -> None:
    shape, mixture = MIXTURES[name]
    folder = grow(shape, tmp_path, "fp32", mixture=mixture, skew=skew)
    reader = load(READER)
    grown = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert grown.config.num_experts_per_tok == mixture.top_k
    for question in QUESTIONS:
        ids = prompt_ids(question)
        assert_same_logits(grown, reader, ids)


@needs_reader
def test_routers_are_as_skewed_as_they_are_meant_to_be() -> None:
    top = []
    for skew in (0.0, 1.0, 1.4):
        routers = Routers(READER, 64, skew)
        chosen = (routers._seen[2] @ routers.weights(2).T).topk(4).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=64).sort(descending=True).values
        top.append(float(counts[:16].sum() / counts.sum()))
    assert 0.25 < top[0] < 0.7 < top[1] < top[2]


@needs_reader
def test_tied_shape_has_no_head_on_disk(tmp_path: Path) -> None:
    grow(Shape(512, 600, 5, 8, 4, 1200, tied=True), tmp_path, "bf16")
    assert "lm_head" not in (tmp_path / "model.safetensors.index.json").read_text()
    grown = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert grown.dtype == torch.bfloat16
    assert grown.lm_head.weight is grown.model.embed_tokens.weight


def test_parse_shape() -> None:
    assert parse_shape("8B") is SHAPES["8B"]
    assert parse_shape("512,768,6,8,4,2048") == SHAPES["tiny"]
    with pytest.raises(ValueError, match="six numbers"):
        parse_shape("13B")


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (Shape(192, 512, 3, 6, 3, 1024), "layers smaller"),
        (Shape(256, 512, 4, 4, 4, 1024), "group smaller"),
        (Shape(384, 512, 4, 8, 4, 1024), "head dimension"),
    ],
)
def test_shapes_that_do_not_fit(new: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_growth(Shape(192, 512, 4, 6, 3, 1024), new)
