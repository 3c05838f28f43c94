"""``llama_index.llms.layerstream.LayerStreamLLM``: what LlamaIndex calls reaches the engine, and back."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from layerstream.errors import EngineClosed, PromptError
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.llms.layerstream import LayerStreamLLM

from tests.integrations.fake_engine import WORDS, FakeEngine

TEXT = "".join(WORDS)
CUMULATED = ["".join(WORDS[: count + 1]) for count in range(len(WORDS))]
MESSAGES = [
    ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
    ChatMessage(role=MessageRole.USER, content="who?"),
]


def make(**fields: Any) -> tuple[LayerStreamLLM, FakeEngine]:
    engine = fields.pop("engine", None) or FakeEngine()
    return LayerStreamLLM(engine=engine, **fields), engine


def test_is_a_llama_index_llm() -> None:
    assert issubclass(LayerStreamLLM, BaseLLM)


def test_complete_gives_text_and_usage() -> None:
    llm, engine = make()
    response = llm.complete("who?")
    assert response.text == TEXT
    assert response.raw["usage"]["completion_tokens"] == len(WORDS)
    assert engine.batches == [["who?"]]


def test_stream_complete_cumulates_the_text() -> None:
    llm, _ = make()
    pieces = list(llm.stream_complete("who?"))
    assert [piece.text for piece in pieces] == CUMULATED
    assert [piece.delta for piece in pieces] == WORDS
    assert pieces[-1].raw["finish_reason"] == "stop"


def test_chat_goes_through_the_chat_template() -> None:
    llm, engine = make(engine=FakeEngine(has_chat_template=True))
    assert llm.chat(MESSAGES).message.content == TEXT
    assert engine.batches == [["<s><|system|>Be brief.<|user|>who?<|assistant|>"]]
    assert llm.metadata.is_chat_model


def test_chat_without_a_template_is_lines_of_text() -> None:
    llm, engine = make()
    assert [response.message.content for response in llm.stream_chat(MESSAGES)] == CUMULATED
    assert engine.batches == [["system: Be brief.\nuser: who?\nassistant: "]]
    assert not llm.metadata.is_chat_model


def test_a_plain_prompt_becomes_a_message_unless_it_is_formatted() -> None:
    llm, engine = make(engine=FakeEngine(has_chat_template=True))
    llm.complete("who?")
    llm.complete("<user>who?", formatted=True)
    assert engine.batches == [["<s><|user|>who?<|assistant|>"], ["<user>who?"]]


async def test_every_call_has_an_async_twin() -> None:
    llm, _ = make()
    assert (await llm.acomplete("who?")).text == TEXT
    assert (await llm.achat(MESSAGES)).message.content == TEXT
    assert [piece.text async for piece in await llm.astream_complete("who?")] == CUMULATED
    assert [piece.message.content async for piece in await llm.astream_chat(MESSAGES)] == CUMULATED


async def test_async_calls_travel_together() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    calls = asyncio.gather(*(llm.acomplete(f"question {number}") for number in range(5)))
    while len(engine.requests) < 5:
        await asyncio.sleep(0)
    for request in engine.requests:
        engine.release(request)
    assert [response.text for response in await asyncio.wait_for(calls, 10)] == [TEXT] * 5


def test_metadata_is_the_engines() -> None:
    llm, engine = make(max_new_tokens=33)
    assert llm.metadata.context_window == engine.context_length
    assert llm.metadata.num_output == 33
    assert llm.metadata.model_name == "fake"


def test_fields_of_the_instance_and_the_call_become_sampling_params() -> None:
    llm, engine = make(temperature=0.5, seed=3, stop=["\n"])
    llm.complete("who?", temperature=0.7, max_tokens=5)
    (params,) = engine.params
    assert (params.temperature, params.max_tokens, params.seed, list(params.stop)) == (0.7, 5, 3, ["\n"])


def test_leaving_a_stream_cancels_its_request() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    stream = llm.stream_complete("who?")
    feeder = threading.Thread(target=lambda: engine.submitted.wait(10) and engine.release(engine.requests[0], 2))
    feeder.start()
    assert next(stream).delta == WORDS[0]
    stream.close()  # type: ignore[attr-defined]
    feeder.join()
    assert engine.cancelled == engine.requests


async def test_cancelling_a_task_cancels_its_request() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    task = asyncio.create_task(llm.acomplete("who?"))
    while not engine.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while not engine.cancelled:  # the thread that handed it in may be busy with it
        await asyncio.sleep(0)
    assert engine.requests[0] in engine.cancelled


def test_the_engines_error_comes_out() -> None:
    llm, engine = make()
    engine.error = EngineClosed("the engine is closed")
    with pytest.raises(EngineClosed):
        llm.complete("who?")


def test_a_refused_prompt_is_logged_since_synthesizers_swallow_it(caplog: pytest.LogCaptureFixture) -> None:
    llm, engine = make()

    def refuse(*_: object, **__: object) -> None:
        raise PromptError("not a prompt")

    engine.submit_many = refuse  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR), pytest.raises(PromptError):
        llm.complete("who?")
    assert "not a prompt" in caplog.text


def test_callbacks_see_one_event_per_call() -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llm, _ = make(callback_manager=CallbackManager([handler]))
    llm.complete("who?")
    assert len(handler.get_event_pairs(CBEventType.LLM)) == 1


def test_nothing_is_loaded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSTREAM_MODEL", "some/where")
    llm = LayerStreamLLM(engine_kwargs={"memory": "3GiB"})
    assert llm.model == "some/where"
    assert LayerStreamLLM.class_name() == "LayerStreamLLM"
    assert llm.to_dict()["engine_kwargs"] == {"memory": "3GiB"}
    assert not llm._handle.is_loaded


def test_with_the_bundled_reader_the_text_is_the_engines() -> None:
    from layerstream import LayerStream, SamplingParams

    prompt = "Context:\nBrenvik is led by Tolmund Varek.\n\nQuestion: Who leads Brenvik?\nAnswer:"
    with LayerStream("demo") as engine:
        llm = LayerStreamLLM(engine=engine, max_new_tokens=12)
        expected = engine.generate(prompt, SamplingParams(max_tokens=12))[0].text
        assert llm.complete(prompt, formatted=True).text == expected
        assert [*llm.stream_complete(prompt, formatted=True)][-1].text == expected
