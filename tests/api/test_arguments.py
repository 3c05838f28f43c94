"""Whatever a caller passes is taken as it was meant or refused at the call, with its name and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerstream import ConfigurationError, InvalidSamplingParams, LayerStream, LayerStreamError, SamplingParams
from layerstream.api.arguments import seconds
from layerstream.api.params import as_params, derive_seed

from tests.harness import draw_prompt

PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


STRANGE: list[Any] = [
    "high", "", b"3", [], {}, (), {1: 2}, object(), Unprintable(), math.nan, math.inf, -math.inf, True, None, 10**5000,
    -(10**5000), 1e308, -1, Decimal(1), 1j, np.array([1, 2]), np.float32("nan"), torch.tensor([1.0, 2.0]), len, int,
    Fraction(1, 2),
]  # fmt: skip
NUMBERS = [f.name for f in dataclasses.fields(SamplingParams) if f.name not in ("response_format", "stop")]


@pytest.mark.parametrize("field", [*NUMBERS, "stop", "response_format"])
def test_no_field_takes_what_it_cannot_mean(field: str) -> None:
    for value in STRANGE:
        params, error = outcome(lambda value=value: SamplingParams(**{field: value}))
        if error is None:
            kept = getattr(params, field)
            assert type(kept) in (int, float, bool, tuple, type(None)), f"{type(value)} was kept as {type(kept)}"
            assert not isinstance(kept, float) or math.isfinite(kept)
        else:
            assert isinstance(error, InvalidSamplingParams)
            assert error.field in (field, "n", "best_of", "beam_width")
            assert str(error).startswith(f"SamplingParams.{error.field} is ")
            assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": np.int64(4), "top_k": np.uint8(3)}, {"max_tokens": 4, "top_k": 3}),
        ({"temperature": np.float32(0.5), "top_p": torch.tensor(0.25)}, {"temperature": 0.5, "top_p": 0.25}),
        ({"ignore_eos": np.True_}, {"ignore_eos": True}),
        ({"min_p": Fraction(1, 2)}, {"min_p": 0.5}),
        ({"stop_token_ids": np.array([3, 4])}, {"stop_token_ids": (3, 4)}),
        ({"stop_token_ids": 7}, {"stop_token_ids": (7,)}),
        ({"stop": (text for text in "ab")}, {"stop": ("a", "b")}),
    ],
)
def test_numbers_of_others_are_numbers(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for name, value in expected.items():
        assert getattr(params, name) == value
        assert type(getattr(params, name)) is type(value)


@pytest.mark.parametrize(
    "response_format",
    [{"type": []}, {"type": {}}, {"type": "regex", "regex": 5}, {"type": "choice", "choices": "ab"}, 5, "json", [1]],
)
def test_forms_that_are_none(response_format: Any) -> None:
    with pytest.raises(InvalidSamplingParams, match="response_format is"):
        SamplingParams(response_format=response_format)


def test_something_without_an_end() -> None:
    def ends() -> Any:
        while True:
            yield "x"

    with pytest.raises(InvalidSamplingParams, match="stop is"):
        SamplingParams(stop=ends())


def test_a_dict_is_parameters_and_an_unknown_field_is_hinted_at(engine: LayerStream) -> None:
    assert as_params({"max_tokens": 4}) == SamplingParams(max_tokens=4)
    assert as_params(None) == SamplingParams()
    for wrong, hint in (
        ({"max_new_tokens": 4}, "use 'max_tokens'"),
        ({"num_beams": 4}, "use 'beam_width'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({5: 1}, "there are beam_width"),
    ):
        with pytest.raises(ConfigurationError, match=hint):
            as_params(wrong)  # type: ignore[arg-type]
    for wrong in ("greedy", 5, [("max_tokens", 4)]):
        with pytest.raises(ConfigurationError, match="params is"):
            as_params(wrong)  # type: ignore[arg-type]
    fields = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
    assert engine.generate([[5, 6]], fields)[0].token_ids == engine.generate([[5, 6]], PARAMS)[0].token_ids
    assert [d.token_ids for d in engine.stream([5, 6], fields)][-1:]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("priority", lambda engine, value: engine.submit([5, 6], PARAMS, priority=value)),
        ("client", lambda engine, value: engine.submit([5, 6], PARAMS, client=value)),
        ("timeout", lambda engine, value: engine.submit([5, 6], PARAMS, timeout=value)),
        ("timeout", lambda engine, value: engine.stream([5, 6], PARAMS, timeout=value)),
        ("size", lambda engine, value: engine.gang(value)),
        ("timeout", lambda engine, value: engine.gang(2, value)),
        ("timeout", lambda engine, value: engine.submit([5, 6], PARAMS).result(value)),
        ("a prompt", lambda engine, value: engine.submit(value, PARAMS)),
        ("", lambda engine, value: engine.generate([[5, 6]], value)),
        ("callback", lambda engine, value: engine.submit([5, 6], PARAMS).add_done_callback(value)),
    ],
)
def test_every_argument_is_checked_at_the_call_and_nobody_else_suffers(
    engine: LayerStream, name: str, call: Callable[[LayerStream, Any], Any]
) -> None:
    neighbour = engine.submit(draw_prompt(9), SamplingParams(max_tokens=60, ignore_eos=True))
    for value in STRANGE:
        _, error = outcome(lambda value=value: call(engine, value))
        assert error is None or len(str(error)) < 1200
    assert len(neighbour.result(60).token_ids) == 60


@pytest.mark.parametrize(
    "name",
    ["model", "device", "device_map", "memory", "host_memory", "host_compute", "dtype", "attention", "quantization",
     "cuda_graphs", "speculation", "draft_model", "max_context", "chunk_tokens", "max_queued", "trust_remote_code",
     "revision", "token", "allow_untested", "progress", "kv_store"],
)  # fmt: skip
def test_every_option_of_the_engine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerstream.front import opened

    def stop_here(*_: object) -> None:
        raise LayerStreamError("all options are checked before anything is opened")

    monkeypatch.setattr(opened, "run_apart", stop_here)
    for value in STRANGE:
        with pytest.raises(LayerStreamError):
            LayerStream(**{"model": folder, "progress": False, name: value})


def test_seconds_to_wait() -> None:
    assert seconds("timeout", None) is None
    assert seconds("timeout", math.inf) is None
    assert seconds("timeout", np.float64("inf")) is None
    assert seconds("timeout", 0) == 0.0
    longest = seconds("timeout", 1e300)
    assert longest is not None
    assert longest < 1e300, "what the system can wait"
    for wrong in (-1, math.nan, "3", True, -math.inf):
        with pytest.raises(ConfigurationError, match=r"timeout is .* expected a number of seconds >= 0, or None"):
            seconds("timeout", wrong)
    with pytest.raises(ConfigurationError, match="> 0"):
        seconds("timeout", 0, above_zero=True)


@given(st.integers(0, 2**63 - 1), st.integers(0, 255))
def test_seeds_of_several_answers(seed: int, index: int) -> None:
    derived = derive_seed(seed, index)
    assert 0 <= derived < 2**63
    assert derive_seed(seed, 0) == seed
    assert SamplingParams(seed=derived).seed == derived, "an answer's seed can be asked for"


def test_neighbouring_seeds_have_no_answer_in_common(engine: LayerStream) -> None:
    seeds = [derive_seed(seed, index) for seed in range(40, 60) for index in range(32)]
    assert len(set(seeds)) == len(seeds)
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=42, n=3, ignore_eos=True)
    found = engine.generate([[5, 6, 7]], params)
    assert found[0].seed == 42
    again = dataclasses.replace(params, n=1, seed=found[2].seed)
    assert engine.generate([[5, 6, 7]], again)[0].token_ids == found[2].token_ids


def outcome(work: Callable[[], Any]) -> tuple[Any, LayerStreamError | None]:
    """What *work* returned, and the typed error that it ended with instead."""
    try:
        return work(), None
    except LayerStreamError as error:
        return None, error


def child_answers(ask: Callable[[], Any]) -> str:
    """What a forked child gets of *ask*: the name of the error, or what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = repr(ask())
        except BaseException as error:  # noqa: BLE001
            said = type(error).__name__
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_at_once_whatever_it_asks(engine: LayerStream) -> None:
    import asyncio

    running = engine.submit(draw_prompt(9), SamplingParams(max_tokens=300, ignore_eos=True))
    done = engine.submit([5, 6], PARAMS)
    done.result(60)

    async def awaited() -> object:
        return await running

    questions: list[Callable[[], Any]] = [
        lambda: engine.submit([5, 6], PARAMS, timeout=3),
        lambda: engine.generate([[5, 6]], PARAMS),
        lambda: list(engine.stream([5, 6], PARAMS)),
        lambda: engine.gang(2).__enter__(),
        lambda: engine.cached_tokens([5, 6]),
        lambda: engine.stats(),
        lambda: engine.warm(["a text"]),
        lambda: running.cancel(),
        lambda: running.result(),
        lambda: done.result(),
        lambda: list(running),
        lambda: asyncio.run(awaited()),
        lambda: running.done(),
        lambda: running.add_done_callback(print),
    ]
    with engine._loop.reception._lock, running._lock:  # as another thread may hold them at the fork
        assert {child_answers(question) for question in questions} == {"EngineClosed"}
        assert child_answers(engine.close) == "None", "a child has nothing to close"
    assert len(running.result(60).token_ids) == 300
    assert len(engine.generate([[5, 6]], PARAMS)[0].token_ids) == 2
