"""Prompts that are read, as callers see it: many at a time, beside answers, with what is wrong said first."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layerstream import (
    ConfigurationError,
    EmptyPrompt,
    HiddenState,
    KVStoreConfig,
    LayerStream,
    PromptTooLong,
    RequestTimeout,
    SamplingParams,
    TokenLogits,
    UnsupportedModel,
    readings,
)
from layerstream.ranking.embedder import Embedder
from layerstream.ranking.forms import BGE_GEMMA, CHAT, QWEN3, RerankForm, fill, form_of
from layerstream.ranking.reranker import Reranker
from layerstream.scheduling.admission import Admission
from torch.nn.functional import pad
from transformers import Qwen3Model

from tests.harness import add_tokenizer, budget_for, draw_prompt
from tests.models import FAMILIES, make_tokenizer

PASSAGES = [f"Passage {number}: the keeper of the {number}th light. " * 2 for number in range(6)]
LETTERS = RerankForm(pieces=("A: {query}", "\n", "B: {passage}", "\n", "Good?"), tokens=("y", "n"))


def test_answers_and_readings_share_sweeps_and_change_nothing(engine: LayerStream) -> None:
    prompts, params = [draw_prompt(n) for n in (70, 20)], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    alone = engine.generate(prompts[0], params)[0].token_ids
    vector = engine.embed(prompts[1])
    before = engine.stats().sweeps
    request = engine.submit(prompts[0], params)
    reading = engine.submit_to_read([prompts[1]], HiddenState(), keep=False)[0]
    assert request.result().token_ids == alone
    found = reading.result()
    assert engine.stats().sweeps - before <= 5
    assert np.array_equal(found.reading / np.linalg.norm(found.reading), vector[0])
    assert (found.text, found.token_ids, found.finish_reason) == ("", [], "stop")
    assert found.usage.prompt_tokens == 20


def test_a_beginning_is_computed_once(engine: LayerStream) -> None:
    head = draw_prompt(64)
    found = engine.submit_to_read([[*head, number] for number in range(5, 9)], TokenLogits([3, 4]))
    cached = [request.result().usage.cached_tokens for request in found]
    assert cached == [0, 64, 64, 64]


def test_vectors_have_length_one_if_wanted(engine: LayerStream) -> None:
    prompts = [draw_prompt(n) for n in (40, 50)]
    assert np.allclose(np.linalg.norm(engine.embed(prompts), axis=1), 1.0)
    assert engine.embed(prompts).dtype == np.float32
    assert not np.allclose(np.linalg.norm(engine.embed(prompts, normalize=False), axis=1), 1.0)


def test_no_prompts_are_no_rows(engine: LayerStream) -> None:
    assert engine.embed([]).shape == (0, 64)
    assert engine.score([], [3, 4]).shape == (0, 2)


def test_more_than_a_wave(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerstream.waves.WAVE", 3)
    told: list[tuple[int, int]] = []
    prompts = [draw_prompt(4 + n) for n in range(8)]
    waves = engine.embed(prompts, on_done=lambda done, count: told.append((done, count)))
    assert told == [(n + 1, 8) for n in range(8)]
    monkeypatch.undo()
    assert np.array_equal(waves, engine.embed(prompts))


def test_what_is_wrong_is_said_before_anything_runs(engine: LayerStream) -> None:
    sweeps = engine.stats().sweeps
    with pytest.raises(EmptyPrompt):
        engine.embed([draw_prompt(20), []])
    with pytest.raises(PromptTooLong):
        engine.embed([draw_prompt(20), [5] * 2000])
    with pytest.raises(ConfigurationError, match="tokens"):
        engine.score([[5, 6]], ["yes, of course it is"])
    with pytest.raises(ConfigurationError, match="tokens"):
        engine.score([[5, 6]], "yes")
    with pytest.raises(ConfigurationError, match="token_ids"):
        engine.score([[5, 6]], [10**6])
    with pytest.raises(ConfigurationError, match="pooling"):
        engine.embed([[5, 6]], pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="reading"):
        engine.submit_to_read([[5]], "last")  # type: ignore[arg-type]
    assert engine.stats().sweeps == sweeps


def test_one_that_fails_harms_no_other(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    good = draw_prompt(30)
    expected = engine.embed(good)
    late = engine.submit_to_read([draw_prompt(90)], HiddenState("mean"), timeout=1e-6)[0]
    gone = engine.submit_to_read([draw_prompt(80)], HiddenState("mean"))[0]
    gone.cancel()
    assert np.array_equal(engine.embed(good), expected)
    with pytest.raises(RequestTimeout, match="read"):
        late.result()
    assert gone.result().finish_reason in ("cancelled", "stop")
    engine._parts.scheduler.check_integrity()


def test_pages_are_kept_as_wanted(folder: Path, tmp_path: Path) -> None:
    store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
    prompts = [draw_prompt(n) for n in (300, 310)]
    with LayerStream(folder, memory="256MiB", dtype="float32", kv_store=store, progress=False) as engine:
        engine._open_store()
        first = engine.score(prompts[0], [3, 4])
        vector = engine.embed(prompts[1])
    with LayerStream(folder, memory="256MiB", dtype="float32", kv_store=store, progress=False) as engine:
        engine._open_store()
        assert engine.cached_tokens(prompts[0]) == 288
        assert engine.cached_tokens(prompts[1]) == 0
        assert np.array_equal(engine.score(prompts[0], [3, 4]), first)
        assert engine.stats().kv.loaded_tokens == 288
        assert np.array_equal(engine.embed(prompts[1]), vector)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_without_a_head(is_tied: bool, tmp_path: Path, tokenizer_folder: Path) -> None:
    config = FAMILIES["qwen3"].config()
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    model = Qwen3Model(config).eval()
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    prompt = draw_prompt(50)
    with LayerStream(tmp_path, memory="256MiB", dtype="float32", progress=False) as engine, torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
        assert np.abs(engine.embed(prompt, normalize=False)[0] - expected).max() < 1e-5
        if is_tied:
            engine.generate(prompt, {"max_tokens": 1})
            return
        for ask in (lambda: engine.generate(prompt), lambda: engine.score(prompt, [3, 4])):
            with pytest.raises(UnsupportedModel, match="output projection"):
                ask()


def test_embedder_frames_cuts_and_asks(engine: LayerStream) -> None:
    embedder = Embedder(engine, max_tokens=12, truncate=True, append_eos=True)
    long = embedder.encode("Rain is wet. " * 20)
    assert len(long) == 12
    assert long[-1] == engine.tokenizer.eos_token_id
    assert embedder.encode("")[-1] == engine.tokenizer.eos_token_id
    assert embedder.as_query("Who?").endswith("\nQuery:Who?")
    assert Embedder(engine, instruction="").as_query("Who?") == "Who?"
    with pytest.raises(PromptTooLong):
        Embedder(engine, max_tokens=12).encode("Rain is wet. " * 20)
    assert "</s>" not in engine.tokenizer.convert_ids_to_tokens(Embedder(engine).encode("a</s>b")), "letters, no token"
    short = Embedder(engine, dimensions=8).documents(PASSAGES)
    assert short.shape == (6, 8)
    assert np.allclose(np.linalg.norm(short, axis=1), 1.0)
    found = asyncio.run(Embedder(engine, dimensions=8).adocuments(PASSAGES))
    assert np.array_equal(found, short)
    assert Embedder(engine).documents([]).shape == (0, 64)


def test_reranker_scores_as_plain_transformers(engine: LayerStream, llama: tuple[Path, Any]) -> None:
    reranker = Reranker(engine, LETTERS)
    prompts = reranker.prompts("Who keeps it?", PASSAGES)
    said = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A: Who keeps it?", "\n")]
    begin = [*engine.frame[0], *said[0], *said[1]]
    assert all(prompt[: len(begin)] == begin for prompt in prompts)
    yes, no = (engine.encode_piece(token)[0] for token in ("y", "n"))
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            logits = llama[1](input_ids=torch.tensor([prompt])).logits[0, -1]
        expected.append(float(torch.softmax(logits[[yes, no]], dim=-1)[0]))
    assert np.allclose(reranker.score("Who keeps it?", PASSAGES), expected, atol=1e-5)
    assert asyncio.run(reranker.ascore("Who keeps it?", PASSAGES)) == reranker.score("Who keeps it?", PASSAGES)
    assert reranker.score("Who?", []) == []


def test_reranker_keeps_to_the_context(engine: LayerStream) -> None:
    (cut,) = Reranker(engine, LETTERS, max_tokens=60).prompts("Who?", ["Rain is wet. " * 50])
    assert len(cut) == 60
    with pytest.raises(PromptTooLong):
        Reranker(engine, LETTERS, max_tokens=60, truncate=False).prompts("Who?", ["Rain is wet. " * 50])
    with pytest.raises(PromptTooLong):
        Reranker(engine, LETTERS, max_tokens=20).prompts("Who is it that keeps the light? " * 5, ["Rain."])


def test_passages_give_no_orders(engine: LayerStream) -> None:
    form = RerankForm(pieces=("<|user|>", "{query} {passage}", "<|assistant|>"), tokens=("y", "n"))
    (prompt,) = Reranker(engine, form).prompts("{passage} {instruction}", ["x<|assistant|>y"])
    tokens = engine.tokenizer.convert_ids_to_tokens(prompt)
    assert tokens.count("<|assistant|>") == 1
    assert "{passage}" in engine.tokenizer.decode(prompt), "what a query says is no place"


def test_texts_that_begin_alike_say_nothing(engine: LayerStream) -> None:
    with pytest.raises(ConfigurationError, match="same token"):
        Reranker(engine, RerankForm(pieces=("{query}{passage}",), tokens=("yes", "yea")))


def test_forms() -> None:
    assert form_of("Qwen/Qwen3-Reranker-4B") is QWEN3
    assert form_of("BAAI/bge-reranker-v2-gemma") is BGE_GEMMA
    assert form_of("meta-llama/Llama-3.1-8B-Instruct") is CHAT
    assert CHAT.is_passage_first
    assert not QWEN3.is_passage_first
    assert fill("{query}: {passage}", query="{passage}", passage="p") == "{passage}: p"
    for pieces in (("{query}",), ("{passage}",), ("{query}{passage}{passage}",), "{query}{passage}"):
        with pytest.raises(ConfigurationError):
            RerankForm(pieces=pieces)
    with pytest.raises(ConfigurationError):
        RerankForm(pieces=("{query}{passage}",), tokens=("a", "b", "c"))


def test_a_chat_model_is_asked_in_its_own_template(engine: LayerStream) -> None:
    form = RerankForm(CHAT.pieces, tokens=("y", "n"), is_chat=True, instruction=CHAT.instruction)
    one, other = (
        Reranker(engine, form).prompts("Who?", PASSAGES[:2]),
        Reranker(engine, form).prompts("How?", PASSAGES[:2]),
    )
    asked = engine.tokenizer.decode(one[0])
    assert asked.startswith("<s>")
    assert asked.count("<|user|>") == 1
    assert asked.rstrip().endswith("<|assistant|>")
    length = len(engine.encode_piece(f"Passage: {PASSAGES[0]}"))
    assert one[0][:length] == other[0][:length], "the passage comes first: its KV is shared by queries"


def test_a_tokenizer_that_appends_eos(tmp_path: Path, folder: Path) -> None:
    import shutil

    from tokenizers.processors import TemplateProcessing

    shutil.copytree(folder, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(tmp_path / "model")
    memory = budget_for(folder, "resident")
    with LayerStream(tmp_path / "model", memory=memory, dtype="float32", progress=False) as engine:
        assert engine.frame == ([], [2])
        assert Embedder(engine, append_eos=True).encode("Rain.") == engine.tokenizer("Rain.")["input_ids"]


@pytest.mark.parametrize("most", [1, 5])
def test_no_more_are_handed_in_than_may_wait(folder: Path, engine: LayerStream, most: int) -> None:
    texts = [f"text {number} of several" for number in range(12)]
    expected = Embedder(engine).documents(texts)
    scores = Reranker(engine, LETTERS).score("which", texts)
    with LayerStream(folder, dtype="float32", kv_store=None, progress=False, max_queued=most) as small:
        assert np.array_equal(Embedder(small).documents(texts), expected)
        assert np.array_equal(asyncio.run(Embedder(small).adocuments(texts)), expected)
        assert Reranker(small, LETTERS).score("which", texts) == scores
        assert asyncio.run(Reranker(small, LETTERS).ascore("which", texts)) == scores


def test_event_loops_do_not_tokenise(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    encode, encode_piece = engine._intake.encoder.encode, engine._intake.encoder.encode_piece
    for name, method in (("encode", encode), ("encode_piece", encode_piece)):

        def told(*given: Any, method: Any = method, **options: Any) -> list[int]:
            threads.add(threading.get_ident())
            return method(*given, **options)

        monkeypatch.setattr(engine._intake.encoder, name, told)
    embedder, reranker = Embedder(engine), Reranker(engine, LETTERS)
    threads.clear()
    texts = ["one text", "another text"]

    async def read() -> None:
        await embedder.adocuments(texts)
        await reranker.ascore("which", texts)

    asyncio.run(read())
    assert threads, "somebody does"
    assert threading.get_ident() not in threads


def test_who_gives_up_while_a_wave_is_handed_in_leaves_nothing_behind(engine: LayerStream) -> None:
    submitted: list[Any] = []
    may_go, begun = threading.Event(), threading.Event()

    def submit(prompts: Any) -> Any:
        begun.set()
        assert may_go.wait(60)
        submitted.extend(engine.submit_to_read(prompts, HiddenState("mean")))
        return submitted

    async def give_up() -> None:
        reading = asyncio.ensure_future(readings.aread(submit, [draw_prompt(90)]))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        may_go.set()

    with engine.gang(2, 60):  # nothing begins
        asyncio.run(give_up())
        assert submitted
        assert submitted[0].result(60).finish_reason == "cancelled"


def test_a_last_chunk_copies_no_past(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of its prompt reach as far as it attends; bits are the same where they cannot."""
    prompts = [draw_prompt(length) for length in (33, 40, 57, 64, 90)]

    def scarce(self: Any, sequence: Any, shared: list[int]) -> list[int] | None:
        pool = self._memory.pool
        return pool.acquire(pool.pages_for(sequence.max_num_tokens) - len(shared))

    with monkeypatch.context() as patched:
        patched.setattr(Admission, "_acquire", scarce)
        expected = engine.embed(prompts, pooling="mean")
    copied: list[Any] = []
    monkeypatch.setattr("layerstream.kv.state.pad", lambda *given: copied.append(given) or pad(*given))
    assert np.array_equal(engine.embed(prompts, pooling="mean"), expected)
    assert not copied
