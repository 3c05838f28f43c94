"""Documents prefilled ahead of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layerstream import ConfigurationError, KVStoreConfig, LayerStream, PromptTooLong, SamplingParams, StorageFull
from layerstream.text.prompt import QUESTION_PROMPT
from layerstream.warming import Warming

from tests.harness import add_tokenizer
from tests.models import make_model

CHUNK = 32
DOCUMENTS = [f"The {name} of the house has {count} doors. " * 12 for count, name in enumerate(("hall", "attic"), 3)]
PARAMS = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture
def store(tmp_path: Path) -> KVStoreConfig:
    return KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)


def by_second(engine: LayerStream, texts: list[str], tenant: str = "") -> list[float]:
    """The second document is three times as popular."""
    return [3.0 if text == DOCUMENTS[1] else 1.0 for text in texts]


def make(store: KVStoreConfig | None) -> LayerStream:
    return LayerStream("demo", kv_store=store, chunk_tokens=CHUNK, progress=False)


def ask(engine: LayerStream, document: str, question: str) -> int:
    prompt = QUESTION_PROMPT.format(context=document, question=question)
    return engine.generate([[{"role": "user", "content": prompt}]], PARAMS)[0].usage.cached_tokens


def test_what_was_warmed_is_the_prefix_of_questions(store: KVStoreConfig) -> None:
    with make(store) as engine:
        calls: list[tuple[int, int]] = []
        report = engine.warm(DOCUMENTS, on_document=lambda *counts: calls.append(counts))
        assert calls == [(0, 2), (1, 2), (2, 2)]
        assert report.computed_tokens == report.forecast.missing_tokens == report.forecast.prefix_tokens > 0
    with make(store) as engine:
        for document in DOCUMENTS:
            whole = engine.encode([{"role": "user", "content": QUESTION_PROMPT.format(context=document, question="X")}])
            cached = ask(engine, document, "How many doors?")
            assert cached % engine.plan.page_tokens == 0
            assert len(whole) - cached < 2 * CHUNK, "all but the question and a part of a page"


def test_warming_again_computes_nothing(store: KVStoreConfig) -> None:
    with make(store) as engine:
        engine.warm(DOCUMENTS[:1])
    with make(store) as engine:
        forecast = engine.forecast_warm(DOCUMENTS)
        assert 0 < forecast.missing_tokens < forecast.prefix_tokens
        assert engine.warm(DOCUMENTS).computed_tokens == forecast.missing_tokens
        sweeps = engine.stats().sweeps
        assert engine.warm(DOCUMENTS).computed_tokens == 0
        assert engine.stats().sweeps == sweeps


def test_an_interrupted_run_goes_on(store: KVStoreConfig) -> None:
    def interrupt(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with make(store) as engine, pytest.raises(KeyboardInterrupt):
        engine.warm(DOCUMENTS, on_document=interrupt)
    with make(store) as engine:
        forecast = engine.forecast_warm(DOCUMENTS)
        assert forecast.missing_tokens < forecast.prefix_tokens
        engine.warm(DOCUMENTS)
        assert engine.forecast_warm(DOCUMENTS).missing_tokens == 0


def test_templates(store: KVStoreConfig) -> None:
    def as_messages(context: str, question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": context}, {"role": "user", "content": question}]

    with make(store) as engine:
        report = engine.warm(DOCUMENTS, prompt=as_messages)
        assert report.computed_tokens > 0
        messages = as_messages(DOCUMENTS[0], "How many doors?")
        assert engine.generate([messages], PARAMS)[0].usage.cached_tokens > 0
        engine.warm(DOCUMENTS, prompt="{context}\n{question}", chat_template=False)
        assert engine.generate([f"{DOCUMENTS[0]}\nHow many doors?"], PARAMS)[0].usage.cached_tokens > 0


def test_a_forecast_knows_the_bytes(store: KVStoreConfig) -> None:
    with make(store) as engine:
        forecast = engine.forecast_warm(DOCUMENTS)
        assert forecast.fits
        assert forecast.seconds is None, "nothing was measured yet"
        engine.warm(DOCUMENTS)
        assert engine.forecast_warm(DOCUMENTS).stored_bytes == pytest.approx(forecast.missing_bytes, rel=0.2)
        again = engine.forecast_warm([document + "And more." for document in DOCUMENTS])
        assert again.seconds is not None


def test_documents_of_a_model_with_recurrent_layers(
    store: KVStoreConfig, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Their snapshots are foreseen; the end of each document is resumed at, by another engine."""
    make_model("qwen3_next", tmp_path / "model")
    add_tokenizer(tmp_path / "model", tokenizer_folder)
    template = "{context}\n{question}"
    with LayerStream(tmp_path / "model", kv_store=store, chunk_tokens=CHUNK, progress=False) as engine:
        forecast = engine.forecast_warm(DOCUMENTS, prompt=template, chat_template=False)
        engine.warm(DOCUMENTS, prompt=template, chat_template=False)
        after = engine.forecast_warm(DOCUMENTS, prompt=template, chat_template=False)
        assert after.missing_tokens == after.missing_bytes == 0
        assert after.stored_bytes == pytest.approx(forecast.missing_bytes, rel=0.2)
        assert engine.stats().kv.written_snapshots >= len(DOCUMENTS)
    with LayerStream(tmp_path / "model", kv_store=store, chunk_tokens=CHUNK, progress=False) as engine:
        for document in DOCUMENTS:
            prompt = template.format(context=document, question="How many doors?")
            whole = len(engine.encode(f"{document}\n")) // CHUNK * CHUNK
            assert engine.generate([prompt], PARAMS)[0].usage.cached_tokens in (whole - CHUNK, whole)
        assert engine.stats().kv.loaded_snapshots == len(DOCUMENTS)


def test_where_not_even_one_fits(store: KVStoreConfig, tmp_path: Path) -> None:
    small = KVStoreConfig(tmp_path / "kv", max_bytes="200KiB", min_free_bytes=0)
    with make(small) as engine:
        with pytest.raises(StorageFull, match=r"takes 480\.0 KiB, and there is room for 180\.0 KiB"):
            engine.warm(DOCUMENTS)
        assert engine.stats().sweeps == 0


def test_what_the_budget_has_no_room_for_is_left_out(store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most popular is warmed; again, it is the same one."""
    monkeypatch.setattr(LayerStream, "popularity", lambda self, texts, **_: [float(t == DOCUMENTS[1]) for t in texts])
    with make(store) as engine:
        for _ in range(2):
            forecast = engine.forecast_warm(DOCUMENTS, budget="600KiB")
            report = engine.warm(DOCUMENTS, budget="600KiB")
            assert (forecast.chosen, forecast.left_out) == (report.warmed, report.left_out) == (1, 1)
            assert not forecast.fits
            assert forecast.coverage == 1.0
        assert ask(engine, DOCUMENTS[1], "How many doors?") > CHUNK
        assert engine.forecast_warm(DOCUMENTS[1:]).missing_tokens == 0
        assert engine.forecast_warm(DOCUMENTS[:1]).missing_tokens > 0


def test_the_top_few(store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LayerStream, "popularity", lambda self, texts, **_: [3.0 if t == DOCUMENTS[1] else 1.0 for t in texts]
    )
    with make(store) as engine:
        report = engine.warm(DOCUMENTS, top=1)
        assert (report.warmed, report.left_out) == (1, 0)
        assert report.forecast.coverage == 0.75
        assert engine.forecast_warm(DOCUMENTS[1:], prompt=None).prefix_tokens == report.forecast.prefix_tokens


def test_the_expected_share_follows_its_formula(store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LayerStream, "popularity", lambda self, texts, **_: [3.0 if t == DOCUMENTS[1] else 1.0 for t in texts]
    )
    with make(store) as engine:
        alone = engine.forecast_warm(DOCUMENTS, top=1, documents_per_prompt=1)
        assert alone.reused_share == alone.coverage == 0.75
        three = engine.forecast_warm(DOCUMENTS, top=1, documents_per_prompt=3)
        assert three.reused_share == pytest.approx(0.25), "one warmed prefix, which is all document, of three"
    monkeypatch.setattr(LayerStream, "popularity", lambda self, texts, **_: [0.0, 0.0])
    with make(store) as engine:
        assert engine.forecast_warm(DOCUMENTS, top=1).reused_share is None, "nobody knows"
        assert engine.forecast_warm(DOCUMENTS).coverage == 1.0


def test_of_a_large_corpus_a_sample_is_encoded(store: KVStoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [f"{number}. The hall of house {number} has {number % 7} doors. " * 6 for number in range(600)]
    with make(store) as engine:
        monkeypatch.setattr("layerstream.warming.forecast.SAMPLE", 1000)
        exact = engine.forecast_warm(corpus)
        monkeypatch.setattr("layerstream.warming.forecast.SAMPLE", 60)
        encoded, encode = [], engine.encode
        monkeypatch.setattr(engine, "encode", lambda prompt: encoded.append(prompt) or encode(prompt))
        estimate = engine.forecast_warm(corpus)
        assert len(encoded) == 2 * 60 + 3, "and once it is seen that documents are shared"
        assert (exact.encoded, estimate.encoded) == (600, 60)
        for name in ("prefix_tokens", "missing_tokens", "missing_bytes"):
            assert getattr(estimate, name) == pytest.approx(getattr(exact, name), rel=0.1)
        assert estimate.chosen == exact.chosen == 600


def test_a_document_that_is_too_long_is_left_out(store: KVStoreConfig) -> None:
    with make(store) as engine:
        report = engine.warm([*DOCUMENTS, "The house has a door. " * 4000])
        assert (report.warmed, report.left_out) == (2, 1)
        with pytest.raises(PromptTooLong):
            engine.warm(["The house has a door. " * 4000])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Answer: {question}", "no {context} and {question}"),
        ("{question}\n{context}", "puts the question before the context"),
    ],
)
def test_templates_that_cannot_work(prompt: str, message: str, store: KVStoreConfig) -> None:
    with make(store) as engine, pytest.raises(ConfigurationError, match=message):
        engine.warm(DOCUMENTS, prompt=prompt)


@pytest.mark.parametrize("wrong", [{"top": 0}, {"budget": "3 elephants"}, {"background": "yes"}])
def test_options_that_cannot_work(wrong: dict[str, Any], store: KVStoreConfig) -> None:
    with make(store) as engine, pytest.raises(ConfigurationError, match=r"top|elephants|background"):
        engine.warm(DOCUMENTS, **wrong)


def test_without_a_store() -> None:
    with make(None) as engine, pytest.raises(ConfigurationError, match="no KV store"):
        engine.warm(DOCUMENTS)


@pytest.mark.parametrize("background", [False, True])
def test_what_a_tenant_warms_no_other_finds(store: KVStoreConfig, background: bool) -> None:
    with make(store) as engine:
        done = engine.warm(DOCUMENTS, tenant="one", background=background)
        if isinstance(done, Warming):
            done.wait(60)
        assert engine.forecast_warm(DOCUMENTS, tenant="one").missing_tokens == 0
        missing = engine.forecast_warm(DOCUMENTS)
        assert missing.missing_tokens == missing.prefix_tokens
