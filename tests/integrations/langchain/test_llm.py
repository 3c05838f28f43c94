"""``langchain_layerstream.LayerStreamLLM``: what LangChain's users call reaches the engine, and back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_layerstream import LayerStreamLLM
from layerstream.errors import EngineClosed, InvalidSamplingParams, PromptTooLong

from tests.integrations.fake_engine import WORDS, FakeEngine

TEXT = "".join(WORDS)


class Tokens(BaseCallbackHandler):
    """Keeps what the callbacks were told."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.errors: list[BaseException] = []

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)


def make(**fields: Any) -> tuple[LayerStreamLLM, FakeEngine]:
    engine = fields.pop("engine", None) or FakeEngine()
    return LayerStreamLLM(engine=engine, **fields), engine


def test_invoke_gives_the_text() -> None:
    llm, engine = make()
    assert llm.invoke("Who leads Brenvik?") == TEXT
    assert engine.batches == [["Who leads Brenvik?"]]


def test_a_chain_of_prompt_model_and_parser() -> None:
    llm, engine = make()
    chain = PromptTemplate.from_template("Q: {question}") | llm | StrOutputParser()
    assert chain.invoke({"question": "who?"}) == TEXT
    assert engine.batches == [["Q: who?"]]


def test_stream_tells_every_delta_once_in_order() -> None:
    llm, _ = make()
    handler = Tokens()
    assert list(llm.stream("who?", config={"callbacks": [handler]})) == WORDS
    assert handler.tokens == WORDS


def test_batch_is_handed_in_as_one() -> None:
    llm, engine = make()
    assert llm.batch(["a", "b", "c"]) == [TEXT] * 3
    assert engine.batches == [["a", "b", "c"]]


async def test_abatch_is_handed_in_as_one() -> None:
    llm, engine = make()
    assert await llm.abatch(["a", "b"]) == [TEXT] * 2
    assert engine.batches == [["a", "b"]]


def test_generate_counts_tokens_and_says_why_it_ended() -> None:
    llm, _ = make()
    result = llm.generate(["a", "b"])
    info = result.generations[1][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "stop"
    assert info["usage"]["output_tokens"] == len(WORDS)
    assert info["metrics"]["sweeps"] == 4
    assert result.llm_output is not None
    assert result.llm_output["token_usage"] == {"prompt_tokens": 14, "completion_tokens": 8, "total_tokens": 22}


def test_fields_of_the_instance_and_the_call_become_sampling_params() -> None:
    llm, engine = make(temperature=0.5, max_tokens=9, seed=3, stop=["\n"])
    llm.bind(stop=["END"], min_p=0.1).invoke("who?", temperature=0.7)
    (params,) = engine.params
    assert (params.temperature, params.max_tokens, params.seed, params.min_p) == (0.7, 9, 3, 0.1)
    assert list(params.stop) == ["\n", "END"]


def test_a_value_out_of_range_says_which() -> None:
    llm, _ = make()
    with pytest.raises(InvalidSamplingParams, match=r"SamplingParams\.top_p is 7"):
        llm.invoke("who?", top_p=7)


def test_the_chat_template_is_used_where_there_is_one() -> None:
    message = [{"role": "user", "content": "who?"}]
    for wanted, has, expected in (("auto", True, message), ("auto", False, "who?"), (False, True, "who?")):
        llm, engine = make(engine=FakeEngine(has_chat_template=has), chat_template=wanted)
        llm.invoke("who?")
        assert engine.batches == [[expected]]


def test_the_engines_error_comes_out_and_callbacks_hear_it() -> None:
    llm, engine = make()
    engine.error = EngineClosed("the engine is closed")
    handler = Tokens()
    with pytest.raises(EngineClosed, match="the engine is closed"):
        llm.invoke("who?", config={"callbacks": [handler]})
    assert handler.errors == [engine.error]


def test_leaving_a_stream_cancels_its_request() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    stream = llm.stream("who?")
    feeder = threading.Thread(target=lambda: engine.submitted.wait(10) and engine.release(engine.requests[0], 2))
    feeder.start()
    assert next(stream) == WORDS[0]
    stream.close()  # type: ignore[attr-defined]
    feeder.join()
    assert engine.cancelled == engine.requests


async def test_astream_lets_others_run_while_the_engine_works() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    handler = Tokens()

    async def consume() -> list[str]:
        return [piece async for piece in llm.astream("who?", config={"callbacks": [handler]})]

    async def feed() -> None:
        while not engine.requests:
            await asyncio.sleep(0)
        for _ in WORDS:
            engine.release(engine.requests[0], 1)
            await asyncio.sleep(0)

    pieces, _ = await asyncio.wait_for(asyncio.gather(consume(), feed()), 10)
    assert "".join(pieces) == TEXT
    assert "".join(handler.tokens) == TEXT


async def test_cancelling_a_task_cancels_its_request() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    task = asyncio.create_task(llm.ainvoke("who?"))
    while not engine.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.requests[0] in engine.cancelled


def test_nothing_is_loaded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSTREAM_MODEL", "some/where")
    llm = LayerStreamLLM(engine_kwargs={"memory": "3GiB"}, temperature=0.0)
    assert llm.model == "some/where"
    assert llm._llm_type == "layerstream"
    assert llm._identifying_params["memory"] == "3GiB"
    assert "some/where" in str(llm)
    dumpd(llm)
    assert not llm._handle.is_loaded


def test_the_cache_key_has_all_that_an_answer_depends_on() -> None:
    keys = {
        str(make(**fields)[0]._identifying_params)
        for fields in ({}, {"seed": 1}, {"max_tokens": 3}, {"top_k": 2}, {"stop": "x"})
    }
    assert len(keys) == 5


def test_with_the_bundled_reader_the_text_is_the_engines() -> None:
    from layerstream import LayerStream, SamplingParams

    prompt = "Context:\nBrenvik is led by Tolmund Varek.\n\nQuestion: Who leads Brenvik?\nAnswer:"
    with LayerStream("demo") as engine:
        llm = LayerStreamLLM(engine=engine, max_tokens=12, chat_template=False)
        expected = engine.generate(prompt, SamplingParams(max_tokens=12))[0].text
        assert llm.invoke(prompt) == expected
        assert "".join(llm.stream(prompt)) == expected
        with pytest.raises(PromptTooLong):
            llm.invoke("word " * 5000)
        assert llm.get_num_tokens("Brenvik") == len(engine.tokenizer("Brenvik", add_special_tokens=False)["input_ids"])
