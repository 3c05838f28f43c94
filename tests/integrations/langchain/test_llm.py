"""``langchain_layerstream.LayerStreamLLM``: what LangChain's users call reaches the engine, and back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_layerstream import LayerStreamLLM
from layerstream import LayerStream
from layerstream.errors import ConfigurationError, EngineClosed, InvalidSamplingParams, PromptTooLong
from pydantic import BaseModel, Field, ValidationError

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


async def test_an_abandoned_stream_is_cancelled() -> None:
    llm, engine = make(engine=FakeEngine(holds_back=True))
    stream = llm.astream("who?")

    async def feed() -> None:
        while not engine.requests:
            await asyncio.sleep(0)
        engine.release(engine.requests[0], 1)

    feeder = asyncio.create_task(feed())
    assert await anext(stream) == WORDS[0]
    await stream.aclose()  # type: ignore[attr-defined]
    await feeder
    assert engine.requests[0] in engine.cancelled


def test_a_cache_knows_answers_by_all_that_they_depend_on() -> None:
    engine, cache = FakeEngine(), InMemoryCache()
    for fields in ({}, {}, {"seed": 3}, {"stop": "x"}, {"chat_template": False}, {"min_p": 0.1}):
        make(engine=engine, cache=cache, **fields)[0].invoke("who?")
    assert len(engine.batches) == 5, "the second of the first two was known"


def test_a_cached_prompt_is_left_out_of_its_batch() -> None:
    llm, engine = make(cache=InMemoryCache())
    llm.invoke("a")
    assert llm.batch(["a", "b"]) == [TEXT] * 2
    assert engine.batches == [["a"], ["b"]]


def test_tracing_params_are_the_calls() -> None:
    llm, _ = make(temperature=0.5, max_tokens=9, stop=["a"])
    params = llm._get_ls_params(stop=["b"], temperature=0.7)
    assert params["ls_provider"] == "layerstream"
    assert params["ls_model_type"] == "llm"
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.7, 9, ["a", "b"])


def test_the_last_chunk_has_usage_and_says_why_it_ended() -> None:
    llm, _ = make()
    (run,) = llm.generate(["who?"]).generations[0]
    chunks = list(llm._stream("who?"))
    assert [chunk.generation_info is not None for chunk in chunks] == [False] * 3 + [True]
    assert chunks[-1].generation_info == {**(run.generation_info or {}), "model_name": "fake"}


def test_structured_answers_of_a_model_that_babbles() -> None:
    class Unit(BaseModel):
        name: str = Field(max_length=6)
        founded: int = Field(ge=1000, le=2099)

    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_tokens=60)
        assert isinstance(llm.with_structured_output(Unit).invoke("Brenvik"), Unit)
        assert set(llm.with_structured_output(Unit.model_json_schema()).invoke("Brenvik")) == {"name", "founded"}
    with pytest.raises(ValueError, match="schema alone"):
        llm.with_structured_output(Unit, method="json_mode")


def test_a_context_that_was_there_before_is_said() -> None:
    prompt = "Brenvik is led by Sluba Merkast. " * 40
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_tokens=2)
        reads = []
        for _ in range(2):
            info = llm.generate([prompt]).generations[0][0].generation_info
            assert info is not None
            reads.append(info["usage"]["input_token_details"]["cache_read"])
        assert reads[0] == 0
        assert reads[1] >= 128


def test_log_probabilities() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        info = LayerStreamLLM(engine=engine, max_tokens=3).generate(["x"], logprobs=2)
    content = (info.generations[0][0].generation_info or {})["logprobs"]["content"]
    assert len(content) == 3
    assert len(content[0]["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"memory": "3GiB"}, "engine_kwargs"),
        ({"top_p": 7}, "top_p is 7"),
    ],
)
def test_a_wrong_field_says_what_to_do(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LayerStreamLLM(**fields)


def test_a_wrong_option_of_a_call_says_what_to_do() -> None:
    llm, engine = make()
    with pytest.raises(ConfigurationError, match="did you mean 'max_tokens'"):
        llm.invoke("who?", max_token=3)
    with pytest.raises(ConfigurationError, match="generate"):
        list(llm.stream("who?", n=2))
    with pytest.raises(InvalidSamplingParams, match="stop"):
        llm.invoke("who?", stop=[3])
    assert engine.batches == []
