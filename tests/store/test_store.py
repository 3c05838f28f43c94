"""KV that outlives the engine: bit for bit, exactly counted, never stale."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream import KVStoreConfig, KVStoreUnusable, LayerStream, SamplingParams
from layerstream.core.sizes import PAGE
from layerstream.kv.keys import page_keys, snapshot_key
from layerstream.planner import facts as assumed
from layerstream.planner import on_host
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.stepping import step_greedily
from layerstream.store.choice import Rates
from layerstream.store.migrations import STEPS
from layerstream.store.segment import read_info

from tests.crossing import ALONE, crossed
from tests.harness import PAGE_TOKENS, add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import make_model
from tests.programs import run_program

CONTEXT = draw_prompt(150)
QUESTIONS = [CONTEXT + draw_prompt(20, seed) for seed in range(3)]
WHOLE_PAGES = 150 // PAGE_TOKENS * PAGE_TOKENS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> KVStoreConfig:
    return KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)


def config(model: Path, store: KVStoreConfig | None, mode: str = "resident", dtype: str = "float32") -> EngineConfig:
    return EngineConfig(str(model), memory_bytes=budget_for(model, mode), dtype=dtype, kv_store=store)


class Session:
    """An engine's parts for a while: logits of prompts, and what the store did."""

    def __init__(self, wanted: EngineConfig) -> None:
        self.parts: Assembly = assemble(wanted, None)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.close()

    def ask(self, *prompts: list[int]) -> list[torch.Tensor]:
        """Logits of four greedy steps per prompt, all prompts in the same sweeps; what they published is stored."""
        logits = step_greedily(self.parts, list(prompts), 4)[1]
        if self.parts.store is not None:
            self.parts.store.flush()
        return logits


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    crossed(
        ["llama", "gemma2", "gpt-oss", "qwen2-moe", "deepseek-v3", "qwen3_5_text"],
        ["resident", "layers", "cut"],
        ["float32", "bfloat16"],
        without=[ALONE],
    ),
)
def test_restarted_is_bitwise_cold(
    family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path, store: KVStoreConfig
) -> None:
    folder = tmp_path / "model"
    make_model(family, folder)
    add_tokenizer(folder, tokenizer_folder)
    with Session(config(folder, None, mode, dtype)) as without:
        cold = [without.ask(prompt)[0] for prompt in QUESTIONS]
    with Session(config(folder, store, mode, dtype)) as first:
        assert equal(first.ask(QUESTIONS[0]), cold[:1]), "the store changes nothing"
    with Session(config(folder, store, mode, dtype)) as second:
        assert equal(second.ask(QUESTIONS[1]), cold[1:2]), "one alone"
        assert second.parts.store is not None
        page_tokens = second.parts.plan.page_tokens
        assert second.parts.store.counters.loaded_tokens == 150 // page_tokens * page_tokens
    with Session(config(folder, store, mode, dtype)) as third:
        assert equal(third.ask(*QUESTIONS), cold), "several at once"
        assert third.parts.store is not None
        assert third.parts.store.counters.lost_pages == 0


@pytest.mark.parametrize(("family", "mode"), [("qwen3_next", "layers"), ("mamba2", "resident")])
def test_states_come_back_or_are_computed_again(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, store: KVStoreConfig
) -> None:
    folder = tmp_path / "model"
    make_model(family, folder)
    add_tokenizer(folder, tokenizer_folder)
    with Session(config(folder, store, mode)) as first:
        cold = first.ask(QUESTIONS[0])
        assert first.parts.store is not None
        assert first.parts.store.counters.written_snapshots
    for num_lost in (0, 1):
        with Session(config(folder, store, mode)) as again:
            assert equal(again.ask(QUESTIONS[0]), cold)
            assert again.parts.store is not None
            counted = again.parts.store.counters
            assert num_lost or counted.loaded_tokens == 160
            assert counted.lost_pages == counted.written_snapshots == num_lost
        (after_all,) = page_keys(QUESTIONS[0], 32)[-1:]
        for path in store.path.rglob("*.kv"):
            if read_info(path).keys == (snapshot_key(after_all),):
                path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_a_page_is_stored_only_as_prefill_made_it(model: Path, store: KVStoreConfig) -> None:
    """Tokens that decoding appended are in the next prompt: computed as prefill then, and only then kept."""
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    with LayerStream(model, kv_store=store) as engine:
        answer = engine.generate([CONTEXT[:40]], params)[0]
    with LayerStream(model, kv_store=store) as engine:
        turn = engine.generate([CONTEXT[:40] + answer.token_ids + [5, 6]], replace(params, max_tokens=1))[0]
        assert turn.usage.cached_tokens == 32, "of 106 tokens only the first 40 were a prompt's"


def test_counts_are_exact(model: Path, store: KVStoreConfig) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LayerStream(model, kv_store=store) as engine:
        assert engine.generate([QUESTIONS[0]], params)[0].usage.cached_tokens == 0
    with LayerStream(model, kv_store=store) as engine:
        for prompt, cached in (
            (QUESTIONS[1], WHOLE_PAGES),
            (CONTEXT[: 2 * PAGE_TOKENS], PAGE_TOKENS),  # never the last token
            (CONTEXT[: 2 * PAGE_TOKENS + 1], 2 * PAGE_TOKENS),
            (CONTEXT[:PAGE_TOKENS], 0),
            ([4, *CONTEXT[1:]], 0),
        ):
            completion = engine.generate([prompt], params)[0]
            assert completion.usage.cached_tokens == cached
        stats = engine.stats().kv
        assert stats.state == "ready"
        assert (stats.hits, stats.loaded_tokens) == (3, WHOLE_PAGES)
        assert stats.reused_tokens == WHOLE_PAGES + 3 * PAGE_TOKENS
        assert engine.generate([QUESTIONS[2]], params)[0].metrics.loaded_tokens == 0, "it is in memory by now"


def test_another_weight_file_under_the_same_name_and_size(model: Path, store: KVStoreConfig) -> None:
    """lmdeploy's five runs, in short: cold, warm, other weights cold, other weights warm, the first ones warm again."""
    path = model / "model.safetensors"
    other = path.with_suffix(".other")
    data = bytearray(path.read_bytes())
    shutil.copy(path, path.with_suffix(".first"))
    data[-4000:] = bytes(byte ^ 1 if at % 4 == 0 else byte for at, byte in enumerate(data[-4000:]))
    other.write_bytes(data)

    def ask() -> tuple[torch.Tensor, int]:
        with Session(config(model, store)) as session:
            logits = session.ask(QUESTIONS[0])[0]
            assert session.parts.store is not None
            return logits, session.parts.store.counters.loaded_tokens

    cold, loaded = ask()
    assert loaded == 0
    assert ask()[1] > 0
    os.replace(other, path)
    swapped, loaded = ask()
    assert loaded == 0
    with Session(config(model, None)) as plain:
        assert equal(plain.ask(QUESTIONS[0]), [swapped])
    assert ask()[1] > 0
    os.replace(path.with_suffix(".first"), path)
    again, loaded = ask()
    assert loaded > 0
    assert torch.equal(again, cold)
    assert not torch.equal(again, swapped)


def test_weights_that_change_while_in_use_are_not_published_for(model: Path, store: KVStoreConfig) -> None:
    with Session(config(model, store)) as session:
        os.utime(model / "model.safetensors")
        session.ask(QUESTIONS[0])
        assert session.parts.store is not None
        assert session.parts.store.counters.written_pages == 0
        assert session.parts.store.state == "unusable"


@pytest.mark.parametrize(
    "change",
    ["config", "dtype", "chunk_tokens", "context", "compression", "threads", "salt", "cuts"],
)
def test_whatever_kv_depends_on_separates_it(
    change: str, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(model, store)
    with Session(first) as session:
        session.ask(QUESTIONS[0])
    second, threads = first, torch.get_num_threads()
    if change == "config":
        settings = json.loads((model / "config.json").read_text())
        settings["rms_norm_eps"] = 1e-4
        (model / "config.json").write_text(json.dumps(settings))
    elif change == "dtype":
        second = replace(first, dtype="bfloat16")
    elif change == "chunk_tokens":
        second = replace(first, chunk_tokens=64)
    elif change == "context":
        second = replace(first, max_context=500)
    elif change == "compression":
        second = replace(first, kv_store=replace(store, compression="int8"))
    elif change == "salt":
        second = replace(first, kv_store=replace(store, salt="another tenant"))
    elif change == "cuts":
        monkeypatch.setattr(on_host, "FINEST_UNIT_BYTES", 4096)
        monkeypatch.setattr(on_host, "RING_SHARE", 0.1)  # matrices are cut by rows
        second = config(model, store, "cut")
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        with Session(second) as session:
            session.ask(QUESTIONS[0])
            assert session.parts.store is not None
            assert session.parts.store.counters.loaded_tokens == 0
        with Session(second) as session:
            session.ask(QUESTIONS[0])
            assert session.parts.store is not None
            assert session.parts.store.counters.loaded_tokens > 0, "and yet it finds its own"
    finally:
        torch.set_num_threads(threads)


def test_what_only_rounds_may_be_left_out(model: Path, store: KVStoreConfig) -> None:
    loose, threads = replace(store, exact=False), torch.get_num_threads()
    with Session(config(model, loose)) as first:
        cold = first.ask(QUESTIONS[0])[0]
    try:
        torch.set_num_threads(threads + 1)
        with Session(config(model, loose)) as second:
            warm = second.ask(QUESTIONS[0])[0]
            assert second.parts.store is not None
            assert second.parts.store.counters.loaded_tokens > 0
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(warm, cold, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_warm_is_cold_under_any_number_of_threads(threads: int, model: Path, store: KVStoreConfig) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with Session(config(model, None)) as plain:
            cold = plain.ask(QUESTIONS[1])
        with Session(config(model, store)) as first:
            first.ask(QUESTIONS[0])
        with Session(config(model, store)) as second:
            assert equal(second.ask(QUESTIONS[1]), cold)
            assert second.parts.store is not None
            assert second.parts.store.counters.loaded_tokens == WHOLE_PAGES
    finally:
        torch.set_num_threads(before)


def test_another_process_finds_it(model: Path, store: KVStoreConfig) -> None:
    program = f"""
import sys
from layerstream import KVStoreConfig, LayerStream, SamplingParams
store = KVStoreConfig({str(store.folder)!r}, load="always", max_bytes="1GiB", min_free_bytes=0)
with LayerStream({str(model)!r}, kv_store=store, dtype="float32") as engine:
    answer = engine.generate([{QUESTIONS[0]!r}], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))[0]
    print(answer.usage.cached_tokens, *answer.token_ids)
"""
    runs = [run_program(program).stdout.split() for _ in range(2)]
    assert runs[0][0] == "0"
    assert runs[1][0] == "160"
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_compressed_pages_come_back_nearly(
    codec: str, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assumed, "PAGE_CHOICES", (32,))  # smaller ones of so few bytes would be padding
    wanted = config(model, replace(store, compression=codec))  # type: ignore[arg-type]
    with Session(wanted) as first:
        cold = first.ask(QUESTIONS[1])[0]
        size = first.parts.store and first.parts.store.counters.written_bytes
    with Session(wanted) as second:
        warm = second.ask(QUESTIONS[1])[0]
    assert not torch.equal(warm, cold)
    assert float((warm[0] - cold[0]).abs().max() / cold.abs().max()) < 0.15
    with Session(config(model, store)) as exact:
        exact.ask(QUESTIONS[1])
        assert exact.parts.store is not None
        assert size
        assert size < exact.parts.store.counters.written_bytes


def test_recomputing_is_chosen_where_it_is_faster(model: Path, store: KVStoreConfig) -> None:
    wanted = config(model, replace(store, load="auto"), "layers")
    with Session(wanted) as first:
        first.ask(QUESTIONS[0])
    with Session(wanted) as second:
        assert second.parts.store is not None
        second.parts.store.rates = lambda: Rates(read_bytes_per_second=1.0, weight_seconds=1.0, max_sweep_tokens=96)
        second.ask(QUESTIONS[1])
        counters = second.parts.store.counters
        assert (counters.loaded_tokens, counters.declined_tokens) == (0, WHOLE_PAGES)
        assert counters.written_pages == 3, "its own pages; what is there is not written again"
    with Session(wanted) as third:
        assert third.parts.store is not None
        third.parts.store.rates = lambda: Rates(read_bytes_per_second=1e12, weight_seconds=0.0, max_sweep_tokens=96)
        third.ask(QUESTIONS[2])
        assert third.parts.store.counters.loaded_tokens == WHOLE_PAGES


def test_writing_is_dropped_when_frames_are_wanted(model: Path, store: KVStoreConfig) -> None:
    """A disk that is slower than the requests costs reuse, not answers."""
    with Session(config(model, store, "layers")) as session:
        parts = session.parts
        assert parts.store is not None
        parts.store.flush()
        with parts.store._writer._changed:
            parts.store._writer._queue.is_busy = True  # the writer is stuck
        prompts = [draw_prompt(400, seed) for seed in range(4)]
        original, parts.store._writer._next = parts.store._writer._next, lambda: None  # type: ignore[method-assign,assignment]
        parts.store._writer._thread.join(0)
        for prompt in prompts:
            step_greedily(parts, [prompt], 2)
        assert parts.scheduler.pool.num_used <= parts.scheduler.pool.num_pages
        parts.store._writer._next = original  # type: ignore[method-assign]
        with parts.store._writer._changed:
            parts.store._writer._queue.is_busy = False


class TestFolders:
    """What may be a store, and what is left alone."""

    def test_a_new_folder_is_private(self, model: Path, store: KVStoreConfig) -> None:
        Session(config(model, store)).parts.close()
        assert stat.S_IMODE(Path(store.path).stat().st_mode) == 0o700

    def test_open_to_others(self, model: Path, store: KVStoreConfig) -> None:
        Session(config(model, store)).parts.close()
        store.path.chmod(0o755)
        with pytest.raises(KVStoreUnusable, match="chmod 700"):
            assemble(config(model, store), None)

    def test_not_a_store(self, model: Path, store: KVStoreConfig) -> None:
        store.path.mkdir()
        (store.path / "thesis.tex").write_text("precious")
        with pytest.raises(KVStoreUnusable, match=r"holds other things \(thesis.tex\)"):
            assemble(config(model, store), None)
        assert [*store.path.iterdir()] == [store.path / "thesis.tex"]

    def test_a_file(self, model: Path, store: KVStoreConfig) -> None:
        store.path.write_text("x")
        with pytest.raises(KVStoreUnusable, match="not a folder"):
            assemble(config(model, store), None)

    def test_from_a_newer_version(self, model: Path, store: KVStoreConfig) -> None:
        Session(config(model, store)).parts.close()
        marker = store.path / "layerstream-kv.json"
        marker.write_text(json.dumps({"format": 99}))
        with pytest.raises(KVStoreUnusable, match="newer version"):
            assemble(config(model, store), None)

    def test_an_index_from_a_newer_version(self, model: Path, store: KVStoreConfig) -> None:
        import sqlite3

        Session(config(model, store)).parts.close()
        connection = sqlite3.connect(store.path / "index.sqlite")
        connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
        connection.close()
        with pytest.raises(KVStoreUnusable, match="newer version"):
            assemble(config(model, store), None)

    def test_somebody_elses(self, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        Session(config(model, store)).parts.close()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(KVStoreUnusable, match="belongs to user"):
            assemble(config(model, store), None)

    def test_on_a_network(self, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layerstream.store.tiers.folder.network_file_system", lambda path: "nfs4")
        with pytest.raises(KVStoreUnusable, match=r"network file system \(nfs4\)"):
            assemble(config(model, store), None)
        assert not store.path.exists()

    def test_the_default_is_done_without_if_it_cannot_be_used(
        self, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.path.write_text("x")
        monkeypatch.setenv("LAYERSTREAM_KV_STORE", str(store.path))
        with caplog.at_level("WARNING", logger="layerstream"), LayerStream(model) as engine:
            assert engine.stats().kv.state == "off"
        assert "no KV store" in caplog.text

    def test_removed_while_nobody_uses_it(self, model: Path, store: KVStoreConfig) -> None:
        for _ in range(2):
            with Session(config(model, store)) as session:
                session.ask(QUESTIONS[0])
                assert session.parts.store is not None
                assert session.parts.store.counters.loaded_tokens == 0
            shutil.rmtree(store.path)

    def test_read_only_is_read(self, model: Path, store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        with Session(config(model, store)) as session:
            session.ask(QUESTIONS[0])
        before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*.kv")}
        monkeypatch.setattr("layerstream.store.tiers.folder.os.access", lambda *_: False)
        with Session(config(model, store)) as session:
            session.ask(QUESTIONS[1])
            assert session.parts.store is not None
            assert session.parts.store.counters.loaded_tokens == WHOLE_PAGES
            assert session.parts.store.counters.written_pages == 0
        assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*.kv")} == before


class TestDamage:
    """Wrong bytes are never attended to, and what is good is kept."""

    @pytest.mark.parametrize("layer", range(3))
    @pytest.mark.parametrize("page", range(4))
    def test_one_flipped_bit(self, page: int, layer: int, model: Path, store: KVStoreConfig) -> None:
        with Session(config(model, store)) as first:
            cold = first.ask(QUESTIONS[0])
        self.flip(store, page, layer)
        with Session(config(model, store)) as second:
            assert equal(second.ask(QUESTIONS[0]), cold)
            assert second.parts.store is not None
            assert second.parts.store.counters.lost_pages == 1
            assert second.parts.store.counters.written_pages == 169 // PAGE_TOKENS - page, "it and its descendants"
        with Session(config(model, store)) as third:
            assert equal(third.ask(QUESTIONS[0]), cold)
            assert third.parts.store is not None
            assert third.parts.store.counters.lost_pages == 0
            assert third.parts.store.counters.loaded_tokens == 168

    def test_several_requests_share_a_damaged_page(self, model: Path, store: KVStoreConfig) -> None:
        with Session(config(model, None)) as plain:
            cold = [plain.ask(prompt)[0] for prompt in QUESTIONS]
        with Session(config(model, store)) as first:
            first.ask(*QUESTIONS)
        self.flip(store, 2, 1)
        with Session(config(model, store)) as second:
            assert equal(second.ask(*QUESTIONS), cold)

    @pytest.mark.parametrize("length", [0, 100, 5000])
    def test_truncated(self, length: int, model: Path, store: KVStoreConfig) -> None:
        with Session(config(model, store)) as first:
            cold = first.ask(QUESTIONS[0])
        for path in store.path.rglob("*.kv"):
            os.truncate(path, length)
        with Session(config(model, store)) as second:
            assert equal(second.ask(QUESTIONS[0]), cold)

    def test_gone(self, model: Path, store: KVStoreConfig) -> None:
        with Session(config(model, store)) as first:
            cold = first.ask(QUESTIONS[0])
        for path in store.path.rglob("*.kv"):
            path.unlink()
        for expected in (0, 168):
            with Session(config(model, store)) as second:
                assert equal(second.ask(QUESTIONS[0]), cold)
                assert second.parts.store is not None
                assert second.parts.store.counters.loaded_tokens == expected

    @pytest.mark.parametrize("damage", ["garbage", "deleted"])
    def test_the_index_is_rebuilt(self, damage: str, model: Path, store: KVStoreConfig) -> None:
        with Session(config(model, store)) as first:
            cold = first.ask(QUESTIONS[0])
        for path in store.path.glob("index.sqlite*"):
            path.unlink()
        if damage == "garbage":
            (store.path / "index.sqlite").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
        with Session(config(model, store)) as second:
            assert equal(second.ask(QUESTIONS[0]), cold)
            assert second.parts.store is not None
            assert second.parts.store.counters.loaded_tokens == 168

    @staticmethod
    def flip(store: KVStoreConfig, page: int, layer: int) -> None:
        """One bit of page *page* of the prompt, in *layer*."""
        from layerstream.kv.keys import page_keys
        from layerstream.store.segment import padded, read_info

        key = page_keys(QUESTIONS[0], PAGE_TOKENS)[page]
        for path in store.path.rglob("*.kv"):
            info = read_info(path)
            if key in info.keys:
                data = bytearray(path.read_bytes())
                size = info.encoded_bytes[layer]
                assert padded(size) % PAGE == 0
                data[info.layer_offsets[layer] + info.keys.index(key) * padded(size) + size // 2] ^= 4
                path.write_bytes(data)
                return
        raise AssertionError("no such page")
