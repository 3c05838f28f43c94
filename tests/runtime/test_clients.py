"""Numbers for each client, bounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from layerstream import LayerStream, SamplingParams
from layerstream.runtime.clients import ClientCounters, ClientStats

from tests.harness import draw_prompt


def over(client: str, index: int = 0) -> Any:
    tenancy = SimpleNamespace(num_cached=3)
    sequence = SimpleNamespace(client=client, num_output_tokens=2, num_prompt_tokens=5, tenancy=tenancy)
    return SimpleNamespace(sequence=sequence, index=index, first_sweep=4.0, submitted=1.0)


def test_a_request_counts_once() -> None:
    counters = ClientCounters()
    for index in range(3):
        counters.count(over("a", index), 9.0)
    assert counters.snapshot() == {"a": ClientStats(1, 5, 3, 6, 3.0)}


def test_those_heard_of_last_are_kept() -> None:
    counters = ClientCounters(most=2)
    for client in ("a", "b", "a", "c"):
        counters.count(over(client), 9.0)
    assert list(counters.snapshot()) == ["a", "c"]


def test_an_engine_counts(engine: LayerStream) -> None:
    prompt, params = draw_prompt(70), SamplingParams(max_tokens=3, ignore_eos=True)
    for _ in range(2):
        engine.generate(prompt, params, client="a")
    engine.embed(prompt, client="b")
    found = engine.stats().clients
    assert (found["a"].requests, found["a"].prompt_tokens, found["a"].generated_tokens) == (2, 140, 6)
    assert found["a"].cached_tokens == 64
    assert (found["b"].requests, found["b"].generated_tokens, found["b"].cached_tokens) == (1, 0, 64)
    assert found["a"].waited_seconds > 0
