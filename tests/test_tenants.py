"""What one tenant's prompts leave behind, no other tenant finds: in memory, on disk, among answers that are guessed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layerstream import ConfigurationError, KVStoreConfig, LayerStream, SamplingParams
from layerstream.kv.keys import page_keys
from layerstream.store.answers import note, places

from tests.harness import budget_for, draw_prompt, shrink_units

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
PROMPTS = [draw_prompt(length, seed=3) for length in (70, 100, 40)]
TENANTS = ["", "a", "b", "\udc80"]

Open = Callable[[], LayerStream]


@pytest.fixture
def opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens engines with one store, one after the other."""
    shrink_units(monkeypatch)
    engines: list[LayerStream] = []

    def open_engine() -> LayerStream:
        for engine in engines:
            engine.close()
        store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
        budget = budget_for(folder, "layers")
        engines.append(LayerStream(folder, memory=budget, dtype="float32", kv_store=store, progress=False))
        engines[-1]._open_store()
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


_SALTS = itertools.count()


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(0, len(PROMPTS) - 1)), min_size=1, max_size=8),
)
def test_a_prompt_is_cached_for_who_asked_it(opened: Open, asked: list[tuple[str, int]]) -> None:
    engine, salt = opened(), next(_SALTS)  # examples share a store
    page, own = engine.plan.page_tokens, {}
    for tenant, number in asked:
        prompt = [3 + salt % 300, 3 + salt // 300 % 300, *PROMPTS[number]]
        tenant = f"{tenant}{salt}"
        expected = own.get((tenant, number), 0)
        assert engine.cached_tokens(prompt, tenant=tenant) == expected
        found = engine.generate(prompt, ONE, tenant=tenant)[0]
        assert found.usage.cached_tokens == expected
        own[tenant, number] = (len(prompt) - 1) // page * page
        assert engine.cached_tokens(prompt, tenant=tenant) == own[tenant, number]


def test_it_is_so_after_a_restart(opened: Open) -> None:
    engine = opened()
    page, prompt = engine.plan.page_tokens, PROMPTS[1]
    whole = (len(prompt) - 1) // page * page
    cold = engine.generate(prompt, ONE, tenant="a")[0]
    warmed = engine.warm(["A document of some length, so that it has a page. " * 3], tenant="a")
    assert warmed.computed_tokens > 0
    engine = opened()
    assert engine.cached_tokens(prompt, tenant="a") == whole
    assert engine.cached_tokens(prompt) == engine.cached_tokens(prompt, tenant="b") == 0
    other, again = engine.generate(prompt, ONE, tenant="b")[0], engine.generate(prompt, ONE, tenant="a")[0]
    assert (other.usage.cached_tokens, again.usage.cached_tokens) == (0, whole)
    assert cold.token_ids == other.token_ids == again.token_ids
    documents = ["A document of some length, so that it has a page. " * 3]
    assert engine.forecast_warm(documents, tenant="a").missing_tokens == 0
    assert engine.forecast_warm(documents, tenant="b").missing_tokens > 0


def test_neighbours_of_other_tenants_share_nothing(opened: Open) -> None:
    engine = opened()
    requests = [engine.submit_many([PROMPTS[1]], ONE, tenant=tenant)[0] for tenant in ("a", "b")]
    first, second = (request.result() for request in requests)
    assert first.usage.cached_tokens == second.usage.cached_tokens == 0
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize("length", [6, 100])
def test_an_answer_is_guessed_for_who_got_it(opened: Open, length: int) -> None:
    engine = opened()
    prompt, params = draw_prompt(length, seed=5), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def guessed(tenant: str) -> int:
        before = engine.stats().drafters["answers"].accepted
        engine.generate(prompt, params, tenant=tenant)
        engine._parts.store.flush()  # pyright: ignore[reportOptionalMemberAccess]
        return engine.stats().drafters["answers"].accepted - before

    assert guessed("a") == 0
    assert guessed("b") == 0
    assert guessed("") == 0
    assert (guessed("a") > 0) == (length > 8), "one that is shorter than a page has no page of theirs"
    assert guessed("") > 0


def test_keys_are_those_of_before_for_the_engines_own() -> None:
    prompt = list(range(100))
    assert page_keys(prompt, 32) == page_keys(prompt, 32, "")
    assert not set(page_keys(prompt, 32)) & set(page_keys(prompt, 32, "a"))
    assert not set(page_keys(prompt, 32, "b")) & set(page_keys(prompt, 32, "a"))


def test_short_prompts_of_tenants_leave_no_answers() -> None:
    assert note([], 32, range(20), [1], is_tenants=True) is None
    assert places([], 32, 20, is_tenants=True) == []
    keys = page_keys(range(60), 32, "a")
    noted = note(keys, 32, range(60), [1], is_tenants=True)
    assert noted is not None
    assert noted.prefix == keys[0]
    assert places(keys, 32, 60, is_tenants=True) == keys


def test_a_tenant_is_a_string(opened: Open) -> None:
    with pytest.raises(ConfigurationError, match="tenant"):
        opened().submit("Who?", tenant=3)  # pyright: ignore[reportArgumentType]
