"""Many tokens out of every sweep, through the engine: guesses, neighbours, time-outs, gangs, a draft model."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from layerstream import ConfigurationError, KVStoreConfig, LayerStream, RequestTimeout, SamplingParams

from tests.harness import add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import make_model, make_tokenizer

FAMILIES = ("llama", "mistral-window", "gemma2", "deepseek-v3", "qwen3-moe")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def repetitive(seed: int = 1) -> list[int]:
    """A prompt that repeats itself, as retrieved contexts do."""
    words = [draw_prompt(4, seed + at) for at in range(5)]
    rng = random.Random(seed)
    return [token for _ in range(16) for token in rng.choice(words)]


@pytest.fixture
def engine(engine: LayerStream) -> LayerStream:
    """As behind a slow link: rows are free."""
    engine._parts.scheduler.budget._read_seconds = lambda: 1e3
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_same_without_guesses(
    family: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_units(monkeypatch)
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [repetitive(seed) for seed in (1, 2, 3)]
    found = []
    for speculation in ("off", "auto"):
        with LayerStream(
            tmp_path, memory=budget_for(tmp_path, "layers"), dtype="float32", speculation=speculation, progress=False
        ) as engine:
            engine._parts.scheduler.budget._read_seconds = lambda: 1e3
            alone = engine.generate([prompts[0]], GREEDY)[0].token_ids
            together = [completion.token_ids for completion in engine.generate(prompts, GREEDY)]
            assert together[0] == alone
            found.append(together)
            assert bool(engine.stats().drafted_tokens) == (speculation == "auto")
    assert found[0] == found[1]


def test_random_draws_are_the_same_among_31_changing_neighbours(engine: LayerStream) -> None:
    """Tokens and log-probabilities to the last bit, whatever the others do and whatever is guessed."""
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=11, ignore_eos=True, logprobs=2)
    prompt = repetitive(5)
    alone = engine.generate([prompt], params)[0]
    rng = random.Random(0)
    for _ in range(2):
        others = []
        request = engine.submit(prompt, params)
        for number in range(31):
            own = SamplingParams(max_tokens=rng.randint(1, 30), temperature=1.0, seed=number, ignore_eos=True)
            others.append(engine.submit(draw_prompt(rng.randint(2, 60), number), own))
            if rng.random() < 0.2:
                rng.choice(others).cancel()
            time.sleep(rng.random() * 0.01)
        among = request.result()
        assert among.token_ids == alone.token_ids
        assert among.logprobs == alone.logprobs
        for other in others:
            other.cancel()


def test_metrics_say_what_happened(engine: LayerStream) -> None:
    completion = engine.generate([repetitive()], GREEDY)[0]
    metrics, stats = completion.metrics, engine.stats()
    assert 0 < metrics.accepted_tokens <= metrics.drafted_tokens
    assert metrics.tokens_per_sweep == len(completion.token_ids) / metrics.sweeps > 1
    assert metrics.sweeps == stats.sweeps
    assert stats.drafters["context"].accepted == stats.accepted_tokens == metrics.accepted_tokens


def test_streams_bring_several_tokens_at_a_time(engine: LayerStream) -> None:
    deltas = list(engine.stream(repetitive(), GREEDY))
    assert max(len(delta.token_ids) for delta in deltas) > 1
    assert len(deltas) == engine.stats().sweeps
    assert sum(len(delta.token_ids) for delta in deltas) == GREEDY.max_tokens
    assert deltas[-1].completion is not None
    assert "".join(delta.text for delta in deltas) == deltas[-1].completion.text


def test_a_time_out_ends_the_request_and_spares_the_others(engine: LayerStream) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    other = engine.submit(draw_prompt(8), GREEDY)
    request = engine.submit(draw_prompt(7), long, timeout=0.05)
    with pytest.raises(RequestTimeout, match=r"given up after 0\.05 seconds"):
        request.result()
    assert len(other.result().token_ids) == GREEDY.max_tokens
    assert engine._parts.scheduler.num_running == 0
    with pytest.raises(ConfigurationError, match="timeout"):
        engine.submit([5], timeout=0)


def test_a_gang_shares_its_sweeps(engine: LayerStream) -> None:
    prompts = [draw_prompt(5 + number) for number in range(8)]
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)

    def ask(number: int) -> list[int]:
        time.sleep(0.01 * number)  # they come one by one
        return engine.generate([prompts[number]], params)[0].token_ids

    with engine.gang(8, timeout=5), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert engine.stats().sweeps <= 3
    assert answers == [completion.token_ids for completion in engine.generate(prompts, params)]


def test_64_threads_with_cancels(engine: LayerStream) -> None:
    rng = random.Random(1)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [draw_prompt(rng.randint(1, 40), number % 7) for number in range(64)]
    expected = {tuple(prompt): None for prompt in prompts}
    for prompt in expected:
        expected[prompt] = tuple(engine.generate([list(prompt)], params)[0].token_ids)  # type: ignore[assignment]
    wrong: list[int] = []

    def ask(number: int) -> None:
        request = engine.submit(prompts[number], params)
        if number % 5 == 0:
            time.sleep(0.002 * (number % 3))
            request.cancel()
        completion = request.result(timeout=60)
        if completion.finish_reason != "cancelled" and tuple(completion.token_ids) != expected[tuple(prompts[number])]:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong
    assert engine._parts.scheduler.num_running == engine._parts.scheduler.num_waiting == 0
    engine._parts.scheduler.check_integrity()


async def test_64_tasks_with_cancels(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = engine.generate([draw_prompt(9)], params)[0].token_ids

    async def ask(number: int) -> list[int] | None:
        request = engine.submit(draw_prompt(9), params)
        if number % 4 == 0:
            await asyncio.sleep(0.001 * number)
            request.cancel()
        completion = await request
        return None if completion.finish_reason == "cancelled" else completion.token_ids

    answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(64))), 120)
    assert all(answer in (None, expected) for answer in answers)
    assert sum(answer == expected for answer in answers) >= 48


def test_answers_are_remembered_across_processes(folder: Path, tmp_path: Path) -> None:
    store = KVStoreConfig(tmp_path / "kv", min_free_bytes=0, max_bytes="1GiB")
    prompt = draw_prompt(200)
    sweeps = []
    for _ in range(2):
        with LayerStream(folder, memory="256MiB", dtype="float32", kv_store=store, progress=False) as engine:
            engine._parts.scheduler.budget._read_seconds = lambda: 1e3
            completion = engine.generate([prompt], GREEDY)[0]
            sweeps.append(completion.metrics.sweeps)
    assert sweeps[1] == 1, "the whole answer was guessed"
    forgetful = KVStoreConfig(tmp_path / "other", min_free_bytes=0, max_bytes="1GiB", answers=False)
    with LayerStream(folder, memory="256MiB", dtype="float32", kv_store=forgetful, progress=False) as engine:
        assert "answers" not in engine.stats().drafters


class TestDraftModel:
    """A small model that guesses for a large one."""

    @pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
    def test_answers_are_the_large_models(
        self, family: str, folder: Path, tmp_path: Path, tokenizer_folder: Path
    ) -> None:
        make_model(family, tmp_path, seed=3)
        add_tokenizer(tmp_path, tokenizer_folder)
        prompts = [draw_prompt(150), draw_prompt(5), repetitive()]
        with LayerStream(folder, memory="256MiB", dtype="float32", speculation="off", progress=False) as engine:
            expected = [completion.token_ids for completion in engine.generate(prompts, GREEDY)]
        with LayerStream(folder, memory="256MiB", dtype="float32", draft_model=str(tmp_path), progress=False) as engine:
            engine._parts.scheduler.budget._read_seconds = lambda: 1e3
            assert [completion.token_ids for completion in engine.generate(prompts, GREEDY)] == expected
            assert engine.stats().drafters["model"].drafted
            assert engine._parts.draft is not None
            assert engine._parts.draft.scheduler.num_running == 0

    def test_one_that_guesses_right_takes_few_sweeps(self, folder: Path) -> None:
        """Its own copy, to see that a tree follows a sure guess to the end (never to measure)."""
        with LayerStream(folder, memory="256MiB", dtype="float32", draft_model=str(folder), progress=False) as engine:
            engine._parts.scheduler.budget._read_seconds = lambda: 1e3
            completion = engine.generate([draw_prompt(40)], GREEDY)[0]
            assert completion.metrics.tokens_per_sweep >= 2, "a random model is sure of nothing"

    def test_another_vocabulary_is_refused(self, folder: Path, tmp_path: Path) -> None:
        make_model("llama", tmp_path)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["layer", "stream"])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match="another vocabulary"):
            LayerStream(folder, memory="256MiB", draft_model=str(tmp_path), progress=False)

    def test_one_that_does_not_fit_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigurationError, match="has to stay resident"):
            LayerStream(folder, memory="1500KiB", dtype="float32", draft_model=str(folder), progress=False)
