"""``reuse="anywhere"``: passages that are moved, through the whole engine.

In a model of one layer what is cached follows from token and position alone, so a blended prompt is exactly what plain
transformers computes, whatever was moved: that is how moving is tested. What a deeper model loses is the business of
``benchmarks/blending.py``.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import KVStoreConfig, LayerStream, SamplingParams
from layerstream.api.completion import Completion
from layerstream.errors import ConfigurationError, UnsupportedModel
from layerstream.runtime import guard

from tests.harness import add_tokenizer, budget_for, shrink_units
from tests.models import make_model

ONE_LAYER = ("llama", "gemma2", "gpt-neox", "phi3", "minicpm3", "glm4", "mixtral")
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=3)
ORDERS = ([0, 1, 2], [2, 0, 1], [3, 1, 0], [1, 3])


def draw_texts(count: int = 4, length: int = 130) -> list[str]:
    rng = random.Random("passages")
    return ["".join(rng.choice("abcdefghij ") for _ in range(length)).strip() for _ in range(count)]


TEXTS = draw_texts()


def prompt_of(order: list[int], question: str = "who") -> str:
    return "Use what stands here.\n\n" + "\n\n".join(TEXTS[text] for text in order) + f"\n\nQuestion: {question}?"


def expected_logprobs(engine: LayerStream, model: Any, prompt: str, answer: Completion) -> torch.Tensor:
    """Log-probabilities of the answer's tokens in plain transformers."""
    ids = engine.encode(prompt)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + answer.token_ids]), use_cache=False).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]


def assert_exact(engine: LayerStream, model: Any, prompt: str, answer: Completion, tolerance: float = 1e-4) -> None:
    found = torch.tensor([token.logprob for token in answer.logprobs or ()])
    difference = (found - expected_logprobs(engine, model, prompt, answer)).abs().max()
    assert difference <= tolerance, f"log-probabilities differ by {difference:.1e}"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)
    monkeypatch.setattr(guard, "LEAST", 0)  # nothing is asked again
    monkeypatch.setattr(guard, "ONE_IN", 10**6)


def open_engine(folder: Path, **options: Any) -> LayerStream:
    return LayerStream(folder, dtype="float32", progress=False, reuse="anywhere", **options)


@pytest.mark.parametrize("family", ONE_LAYER)
@pytest.mark.parametrize("mode", ["layers", "resident"])
@pytest.mark.usefixtures("small")
def test_what_is_moved_is_what_would_be_computed_there(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = make_model(family, tmp_path / "model", sizes={"num_hidden_layers": 1})
    add_tokenizer(tmp_path / "model", tokenizer_folder)
    memory = budget_for(tmp_path / "model", mode)
    for by in ("first", "deviation"):
        store = KVStoreConfig(tmp_path / by, min_free_bytes=0)
        for _ in range(2):  # computed, and then loaded from the store
            with open_engine(
                tmp_path / "model", memory=memory, recompute=0.2, recompute_by=by, kv_store=store, speculation="off"
            ) as engine:
                for order in ORDERS:
                    prompt = prompt_of(order)
                    (answer,) = engine.generate(prompt, PARAMS, passages=TEXTS)
                    engine._open_store().flush()  # what it holds, passages have no room in
                    assert_exact(engine, model, prompt, answer)
                    assert answer.usage.blended_tokens > (100 if mode == "resident" else 0) or len(order) > 2
                engine._parts.scheduler.check_integrity()


@pytest.fixture(params=["first", "deviation"])
def blending(request: pytest.FixtureRequest, folder: Path, small: None) -> Iterator[LayerStream]:
    with open_engine(folder, memory="64MiB", recompute=0.2, recompute_by=request.param, speculation="off") as engine:
        yield engine


def test_all_of_it_recomputed_is_exact(folder: Path, llama: tuple[Path, Any], small: None) -> None:
    for by in ("first", "deviation"):
        with open_engine(folder, memory="64MiB", recompute=1.0, recompute_by=by, speculation="off") as engine:
            for order in ORDERS:
                prompt = prompt_of(order)
                (answer,) = engine.generate(prompt, PARAMS, passages=TEXTS)
                assert_exact(engine, llama[1], prompt, answer)


def test_several_at_once_are_as_good_as_one_by_one(blending: LayerStream) -> None:
    alone = [blending.generate(prompt_of(order), PARAMS, passages=TEXTS)[0] for order in ORDERS]
    together = blending.generate([prompt_of(order) for order in ORDERS], PARAMS, passages=TEXTS)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert other.usage.blended_tokens > 100
    blending._parts.scheduler.check_integrity()


def test_neighbours_of_a_blended_prompt_keep_their_bits(blending: LayerStream) -> None:
    plain = "Something else that nobody has retrieved, of some length, to be sure."
    (alone,) = blending.generate(plain, PARAMS)
    _, among, _ = blending.generate([prompt_of([0, 1]), plain + "", prompt_of([1, 2])], PARAMS, passages=TEXTS)
    assert among.logprobs == alone.logprobs
    assert among.usage.blended_tokens == 0


def test_nothing_blended_is_ever_exact(folder: Path, llama: tuple[Path, Any], tmp_path: Path, small: None) -> None:
    """An exact engine on the same store finds what was computed as it stands, and nothing else."""
    store = KVStoreConfig(tmp_path / "kv", min_free_bytes=0)
    options: dict[str, Any] = {"memory": "64MiB", "dtype": "float32", "kv_store": store, "progress": False}
    with LayerStream(folder, reuse="anywhere", recompute=0.1, **options) as engine:
        for order in ORDERS:
            engine.generate(prompt_of(order), PARAMS, passages=TEXTS)
    with LayerStream(folder, **options) as engine:
        for order in ORDERS:
            prompt = prompt_of(order)
            (answer,) = engine.generate(prompt, PARAMS)
            assert_exact(engine, llama[1], prompt, answer)
            assert answer.usage.blended_tokens == 0


def test_the_same_prompt_again_is_shared_and_said_to_be_blended(blending: LayerStream) -> None:
    first, second = (blending.generate(prompt_of([0, 1]), PARAMS, passages=TEXTS)[0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.usage.cached_tokens > first.usage.cached_tokens
    assert second.usage.blended_tokens > 100


def test_guesses_change_no_blended_answer(folder: Path, small: None) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    answers = []
    for speculation in ("off", "auto"):
        with open_engine(folder, memory="64MiB", recompute=0.2, speculation=speculation) as engine:
            answers.append([engine.generate(prompt_of(o), params, passages=TEXTS)[0].logprobs for o in ORDERS])
    assert answers[0] == answers[1]


def test_in_hardly_any_memory_answers_come_all_the_same(
    folder: Path, llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """Passages that are evicted before they are moved are computed in their place."""
    with open_engine(folder, memory=budget_for(folder, "cut"), recompute=1.0, speculation="off") as engine:
        prompts = [prompt_of(order) for order in itertools.islice(itertools.cycle(ORDERS), 8)]
        answers = engine.generate(prompts, PARAMS, passages=TEXTS)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_exact(engine, llama[1], prompt, answer)
        engine._parts.scheduler.check_integrity()


def test_a_request_that_is_cancelled_takes_its_passages_along(blending: LayerStream) -> None:
    requests = [blending.submit(prompt_of(order), PARAMS, passages=TEXTS) for order in ORDERS]
    for request in requests[::2]:
        request.cancel()
    assert all(len(request.result().token_ids) == 3 for request in requests[1::2])
    blending.generate("a", PARAMS)
    blending._parts.scheduler.check_integrity()
    assert blending._parts.scheduler.num_running == blending._parts.scheduler.num_waiting == 0


@pytest.mark.parametrize("passages", [["", " "], ["too short"], ["not in the prompt " * 20], TEXTS * 3])
def test_passages_that_help_nothing_do_no_harm(blending: LayerStream, passages: list[str]) -> None:
    (answer,) = blending.generate(prompt_of([0, 1]), PARAMS, passages=passages)
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize("passages", ["one text", [1], [None], 7])
def test_what_are_no_passages_are_refused(blending: LayerStream, passages: Any) -> None:
    with pytest.raises(ConfigurationError, match="passages"):
        blending.generate("a prompt", PARAMS, passages=passages)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", "otherwise than by rotations"),
        ("llama4-text", "otherwise than by rotations"),
        ("hunyuan_v1_dense", "how long the prompt is"),
        ("qwen3_next", "one state for all tokens"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(
    family: str, reason: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with pytest.raises(UnsupportedModel, match=reason):
        open_engine(tmp_path)


@pytest.mark.parametrize("option", [{"reuse": "everywhere"}, {"recompute": 1.5}, {"recompute": "all"}])
def test_options_that_cannot_be_meant_are_refused(folder: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        LayerStream(folder, **{"reuse": "anywhere", **option})


def wait_for(engine: LayerStream, count: int) -> None:
    deadline = time.monotonic() + 60
    while engine.stats().reuse.compared_answers < count:  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "nothing is compared"
        time.sleep(0.01)


def test_blended_answers_are_compared_while_nothing_else_is_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_units(monkeypatch)
    with open_engine(folder, memory="64MiB", recompute=1.0) as engine:
        engine.generate(prompt_of([0, 1]), PARAMS, passages=TEXTS)
        stats = engine.stats().reuse
        assert stats is not None
        assert stats.blended_tokens == 0, "all of it was computed again"
    with open_engine(folder, memory="64MiB", recompute=0.1) as engine:
        engine.generate(prompt_of([0, 1]), PARAMS, passages=TEXTS)
        wait_for(engine, 1)
        stats = engine.stats()
        assert stats.reuse is not None
        assert stats.reuse.agreement in {0.0, 1.0}
        assert stats.reuse.blended_answers == 1


def test_the_engine_goes_back_to_exact_where_answers_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)
    monkeypatch.setattr(guard, "LEAST", 1)
    monkeypatch.setattr(guard, "THRESHOLD", 1.1)  # no agreement is enough
    with open_engine(folder, memory="64MiB", recompute=0.1) as engine:
        (first,) = engine.generate(prompt_of([0, 1]), PARAMS, passages=TEXTS)
        wait_for(engine, 1)
        (second,) = engine.generate(prompt_of([2, 3]), PARAMS, passages=TEXTS)
        assert first.usage.blended_tokens > 100
        assert second.usage.blended_tokens == 0
        assert not engine.stats().reuse.is_blending  # type: ignore[union-attr]
