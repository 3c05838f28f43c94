"""Distributions against transformers' own processing, draws against the distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.errors import InvalidLogits
from layerstream.scheduling.sampler import processed_distribution, sample
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCAB = 12


def make(params: SamplingParams, output: list[int] | None = None, prompt: list[int] | None = None) -> Sequence:
    prompt = prompt or [1, 2, 3]
    return Sequence(0, prompt + (output or []), len(prompt), params)


def draw_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.2, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_the_distribution_is_transformers(fields: dict[str, float]) -> None:
    sequence = make(SamplingParams(**fields), [5, 5, 7])  # type: ignore[arg-type]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = LlamaForCausalLM(config)
    generation = GenerationConfig(do_sample=True, **{"top_k": 0, **fields})
    ids = torch.tensor([sequence.token_ids])
    processors = model._get_logits_processor(generation, input_ids_seq_length=3)
    logits = draw_logits()
    expected = torch.softmax(processors(ids, logits[None].clone())[0].double(), -1)
    assert np.allclose(processed_distribution(logits, sequence), expected.numpy(), atol=1e-7)


@pytest.mark.parametrize("fields", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_draws_follow_the_distribution(fields: dict[str, float]) -> None:
    logits, count = draw_logits(3), 4000
    found = np.zeros(VOCAB)
    for seed in range(count):
        sequence = make(SamplingParams(temperature=1.0, seed=seed, **fields), [4])  # type: ignore[arg-type]
        found[sample(logits, sequence).token_id] += 1
    expected = processed_distribution(logits, sequence) * count
    assert not found[expected == 0].any()
    likely = expected > 5
    chi_squared = ((found[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    assert chi_squared < 35  # 11 degrees of freedom: p < 0.0003


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.stack([draw_logits(i) for i in range(4)])
    sequences = [make(SamplingParams(temperature=1.5, seed=7 + i), [1] * i) for i in range(4)]
    together = [sample(row, sequence).token_id for row, sequence in zip(logits, sequences, strict=True)]
    alone = [sample(logits[i], sequences[i]).token_id for i in reversed(range(4))]
    assert together == alone[::-1]
    positions = {
        sample(torch.zeros(VOCAB), make(SamplingParams(temperature=1.0, seed=1), [1] * n)).token_id for n in range(40)
    }
    assert len(positions) > 6


def test_greedy_takes_the_lowest_of_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits[0], make(SamplingParams(temperature=0.0))).token_id == 1


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 5], logits[0, 4], logits[0, 3] = 1.0, 0.9, 0.85
    params = SamplingParams(temperature=0.0, presence_penalty=0.12)
    assert sample(logits[0], make(params, prompt=[5, 5])).token_id == 5
    assert sample(logits[0], make(params, [5])).token_id == 4
    params = SamplingParams(temperature=0.0, frequency_penalty=0.08)
    assert sample(logits[0], make(params, [5, 4])).token_id == 5
    assert sample(logits[0], make(params, [5, 5, 4])).token_id == 3


def test_logprobs_are_the_models_own() -> None:
    logits = draw_logits(5)
    params = SamplingParams(temperature=0.0, repetition_penalty=5.0, logprobs=3)
    token = sample(logits, make(params))
    expected = torch.log_softmax(logits, -1)
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(float(expected[token.token_id]))
    assert [id_ for id_, _ in token.logprob.top] == torch.topk(expected, 3).indices.tolist()
    none = sample(logits, make(SamplingParams(temperature=0.0, logprobs=0))).logprob
    assert none is not None
    assert none.top == ()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_unusable_logits_are_refused(bad: float) -> None:
    with pytest.raises(InvalidLogits, match="sequence 0"):
        sample(torch.full((4,), bad), make(SamplingParams()))
