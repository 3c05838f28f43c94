"""Sequences larger than the memory for KV: accounting in every order of events, then bit for bit in a model."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream import KVStoreConfig, LayerStream, PromptTooLong, SamplingParams, StorageFull
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.keys import page_keys
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import Published, Stored
from layerstream.planner import facts as assumed
from layerstream.planner import on_host
from layerstream.runtime.steward import Steward
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.stepping import step_greedily

from tests.harness import PAGE_TOKENS, add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import make_model

PAGE = 4
LIMITS = SweepLimits(max_tokens=10, chunk_tokens=PAGE, decode_rows=4)


class FakeStore:
    """Keeps contents of pages by key; slow, forgetful and at times full."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.contents: dict[bytes, tuple[int, ...]] = {}
        self.queue: list[Published] = []
        self.done: list[int] = []
        self.given_up: set[bytes] = set()
        self.held: dict[int, list[bytes]] = {}
        self.can_spill: bool | None = True

    def take(self, keys: Seq[bytes], start: int) -> Stored | None:
        if self.rng.random() < 0.1:
            return None
        return Stored(self.count_stored(keys[start:]), 0)

    def abandon(self, keys: Seq[bytes]) -> None:
        """Nothing is claimed."""

    def publish(self, published: Published, seconds: float = 0.0) -> None:
        self.given_up.difference_update(published.keys)
        self.queue.append(published)

    def collect(self) -> list[int]:
        done, self.done = self.done, []
        return done

    def give_back(self) -> list[int]:
        dropped = [item for item in self.queue if not item.is_spilled]
        self.queue = [item for item in self.queue if item.is_spilled]
        return [page for item in dropped for page in item.pages]

    def count_stored(self, keys: Seq[bytes]) -> int:
        missing = (at for at, key in enumerate(keys) if key not in self.contents)
        return next(missing, len(keys))

    def has_given_up(self, key: bytes) -> bool:
        return key in self.given_up

    def hold(self, owner: int, keys: Seq[bytes]) -> None:
        self.held.setdefault(owner, []).extend(keys)

    def unhold(self, owner: int) -> None:
        self.held.pop(owner, None)

    def lose(self, key: bytes) -> None:
        """It is gone already."""

    def work(self, frames: dict[int, tuple[int, ...]], *, is_full: bool = False) -> None:
        """Write something of what is queued."""
        while self.queue and self.rng.random() < 0.7:
            item = self.queue.pop(0)
            for key, page in zip(item.keys, item.pages, strict=True):
                if is_full:
                    self.given_up.update([key] if item.is_spilled else [])
                else:
                    self.contents[key] = frames[page]
            self.done.extend(item.pages)

    def evict(self) -> bytes | None:
        """Forget some page that nobody holds; or, if nothing else is there, damage one that is held."""
        held = {key for keys in self.held.values() for key in keys}
        free = [key for key in self.contents if key not in held]
        victim = self.rng.choice(free or [*self.contents]) if self.contents else None
        if victim is not None:
            del self.contents[victim]
        return victim


def make(number: int, tokens: list[int], max_tokens: int) -> Sequence:
    return Sequence(number, list(tokens), len(tokens), SamplingParams(max_tokens=max_tokens))


def run_rows(sweep: Sweep, pages: dict[int, tuple[int, ...]], store: FakeStore) -> bytes | None:
    """Write what the sweep computes, check what every row sees; the key of a page that was lost, if one was."""
    for load in sweep.loads:
        if load.key not in store.contents:
            return load.key
        pages[load.page] = store.contents[load.key]
    for block in sweep.blocks:
        for span in block.spans:
            for position in range(span.start, span.stop):
                page = span.sequence.pages[position // PAGE]
                old = pages.get(page, ())[: position % PAGE]
                pages[page] = (*old, span.sequence.token_ids[position])
        for span in block.spans:
            seen = [pages[span.sequence.pages[at // PAGE]][at % PAGE] for at in range(span.stop)]
            assert seen == span.sequence.token_ids[: span.stop]
    return None


@settings(max_examples=150)
@given(st.randoms(use_true_random=False))
def test_every_row_sees_exactly_its_own_tokens(rng: random.Random) -> None:
    pool = PagePool(10, PAGE, num_transit=30)
    store = FakeStore(rng)
    scheduler = Scheduler(LIMITS, pool, store)
    steward = Steward(scheduler, None, None, store)  # type: ignore[arg-type]
    pages: dict[int, tuple[int, ...]] = {}
    contexts = [[rng.randrange(3) for _ in range(80)] for _ in range(2)]
    alive: list[Sequence] = []
    for number in range(120):
        if number < 20 and rng.random() < 0.5:
            tokens = [*rng.choice(contexts)[: rng.randrange(1, 80)], rng.randrange(9)]
            alive.append(make(number, tokens, rng.randrange(1, 8)))
            scheduler.add(alive[-1])
        sweep = steward.schedule()
        scheduler.check_integrity()
        for sequence, _ in scheduler.take_failed():
            raise AssertionError(f"{sequence.sequence_id} failed though the store had room")
        store.work(pages)
        if sweep is None:
            continue
        lost = run_rows(sweep, pages, store)
        if lost is not None:
            steward.lose(lost)
            scheduler.check_integrity()
            continue
        for published in scheduler.commit(sweep)[0]:
            store.publish(published)
        for sequence in sweep.sampled:
            sequence.token_ids.append(7)
            if sequence.num_output_tokens == sequence.params.max_tokens:
                steward.remove(sequence)
                alive.remove(sequence)
        if alive and rng.random() < 0.05:
            steward.remove(victim := rng.choice(alive))
            alive.remove(victim)
        if rng.random() < 0.05:
            store.evict()
        scheduler.check_integrity()
    store.rng = random.Random(0)
    for _ in range(2000):  # whatever is left comes to its end
        if not alive:
            break
        sweep = steward.schedule()
        store.work(pages)
        if sweep is None:
            continue
        if (lost := run_rows(sweep, pages, store)) is not None:
            steward.lose(lost)
            continue
        for published in scheduler.commit(sweep)[0]:
            store.publish(published)
        for sequence in sweep.sampled:
            sequence.token_ids.append(7)
            if sequence.num_output_tokens == sequence.params.max_tokens:
                steward.remove(sequence)
                alive.remove(sequence)
    assert not alive
    assert not store.held


def test_a_store_that_is_full_fails_the_long_sequence_alone() -> None:
    store = FakeStore(random.Random(1))
    scheduler = Scheduler(LIMITS, PagePool(10, PAGE, num_transit=30), store)
    steward = Steward(scheduler, None, None, store)  # type: ignore[arg-type]
    long, short = make(0, list(range(80)), 2), make(1, list(range(100, 110)), 2)
    scheduler.add(long)
    scheduler.add(short)
    failed, done = [], set()
    for _ in range(60):
        sweep = steward.schedule()
        for sequence, error in scheduler.take_failed():
            failed.append((sequence, error))
            steward.remove(sequence)
            sweep = None
        store.work(dict.fromkeys(range(40), ()), is_full=True)
        if sweep is not None:
            for published in scheduler.commit(sweep)[0]:
                store.publish(published)
            for sequence in sweep.sampled:
                sequence.token_ids.append(7)
                if sequence.num_output_tokens == 2:
                    steward.remove(sequence)
                    done.add(sequence)
        scheduler.check_integrity()
    assert [sequence for sequence, _ in failed] == [long]
    assert isinstance(failed[0][1], StorageFull)
    assert done == {short}


def test_what_fits_stays_in_memory() -> None:
    scheduler = Scheduler(LIMITS, PagePool(10, PAGE, num_transit=30), FakeStore(random.Random(1)))
    assert scheduler.max_prompt_tokens == 31 * PAGE
    scheduler.add(sequence := make(0, list(range(36)), 4))
    scheduler.schedule()
    assert not sequence.is_long


@pytest.fixture
def family() -> str:
    return "llama"


@pytest.fixture
def model(family: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink_units(monkeypatch)
    monkeypatch.setattr(assumed, "PROMPT_ROWS", 32)
    monkeypatch.setattr(on_host, "DRAFT_SHARE", 0.0)
    monkeypatch.setattr(on_host, "SEQUENCES_SHARE", 0.0)
    monkeypatch.setattr(on_host, "MIN_KV_TOKENS", 256)
    monkeypatch.setattr(on_host, "WANTED_KV_TOKENS", 256)
    monkeypatch.setattr(on_host, "MORE_KV_SHARE", 0.0)
    monkeypatch.setattr(on_host, "TRANSIT_SHARE", 0.9)
    folder = tmp_path / "model"
    make_model(family, folder)
    add_tokenizer(folder, tokenizer_folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> KVStoreConfig:
    return KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)


def config(model: Path, store: KVStoreConfig | None, dtype: str = "float32", percent: int = 109) -> EngineConfig:
    """With *percent* of the budget under which the model, in fp32, streams by layers."""
    budget = budget_for(model, "layers") * percent // 100
    return EngineConfig(str(model), memory_bytes=budget, dtype=dtype, kv_store=store)


def run(wanted: EngineConfig, *prompts: list[int]) -> tuple[list[torch.Tensor], int]:
    parts = assemble(wanted, None)
    try:
        logits = step_greedily(parts, list(prompts), 4)[1]
        assert parts.store is not None
        parts.store.flush()
        return logits, parts.store.counters.loaded_tokens
    finally:
        parts.close()


@pytest.mark.parametrize(
    ("family", "dtype", "percent"),
    [("llama", "float32", 109), ("llama", "bfloat16", 54), ("qwen3_5_text", "float32", 104)],
)
def test_a_prompt_larger_than_the_memory_for_it(
    model: Path, store: KVStoreConfig, dtype: str, percent: int, tmp_path: Path
) -> None:
    wanted = config(model, store, dtype, percent)
    parts = assemble(wanted, None)
    prompt, other = draw_prompt(parts.scheduler.max_prompt_tokens - 12), draw_prompt(90, 3)
    assert parts.plan.num_pages * parts.plan.page_tokens < len(prompt), "it does not fit"
    parts.close()
    roomy = EngineConfig(
        str(model), memory_bytes=budget_for(model, "resident") * 4, dtype=dtype,
        kv_store=replace(store, folder=tmp_path / "roomy"),
    )  # fmt: skip
    expected, _ = run(roomy, prompt)
    cold, _ = run(wanted, prompt)
    assert torch.equal(cold[0][0], expected[0][0]), "as if it had fitted"
    assert torch.allclose(cold[0].float(), expected[0].float(), atol=0.05, rtol=1e-3), "decode rows differ in shape"
    warm, loaded = run(wanted, prompt)
    assert torch.equal(warm[0], cold[0])
    assert loaded >= len(prompt) // 32 * 32
    both, _ = run(wanted, prompt, other, prompt[: len(prompt) - 40] + other[:20])
    assert torch.equal(both[0], cold[0]), "neighbours change nothing"
    assert torch.equal(both[1], run(wanted, other)[0][0])


def test_two_at_once_compute_their_beginning_once(model: Path, store: KVStoreConfig) -> None:
    context = draw_prompt(600)
    wanted = config(model, store)
    one = run(wanted, [*context, 5])[0][0]
    with LayerStream(
        model, kv_store=replace(store, folder=Path(store.path) / ".." / "second"), memory=wanted.memory_bytes,
        dtype="float32",
    ) as engine:  # fmt: skip
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        first, second = engine.generate([[*context, 5], [*context, 6]], params)
        assert first.token_ids[0] == int(one[0].argmax())
        assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 600)


def test_damage_in_a_page_that_streams(model: Path, store: KVStoreConfig) -> None:
    prompt = draw_prompt(670)
    wanted = config(model, store)
    cold, _ = run(wanted, prompt)
    key = page_keys(prompt, PAGE_TOKENS)[3]
    for path in store.path.rglob("*.kv"):
        from layerstream.store.segment import read_info

        if key in read_info(path).keys:
            data = bytearray(path.read_bytes())
            data[100] ^= 1
            path.write_bytes(data)
    assert torch.equal(run(wanted, prompt)[0][0], cold[0])
    assert torch.equal(run(wanted, prompt)[0][0], cold[0])


def test_without_a_store_such_a_prompt_is_refused(model: Path) -> None:
    with (
        LayerStream(model, kv_store=None, memory=config(model, None).memory_bytes, dtype="float32") as engine,
        pytest.raises(PromptTooLong, match="the context has"),
    ):
        engine.generate([draw_prompt(670)])


def test_a_store_without_room_says_so(model: Path, store: KVStoreConfig) -> None:
    tiny = replace(store, max_bytes="200KiB")
    with (
        LayerStream(model, kv_store=tiny, memory=config(model, None).memory_bytes, dtype="float32") as engine,
        pytest.raises(StorageFull, match="the KV store has no room"),
    ):
        engine.generate([draw_prompt(670)], SamplingParams(max_tokens=2))
