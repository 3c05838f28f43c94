"""Batches of chains of any shape share their sweeps, and nobody waits for who does not come."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_layerstream import ChatLayerStream, LayerStreamLLM, gang
from layerstream import LayerStream

from tests.integrations.fake_engine import FakeEngine

QUESTIONS = [f"Who leads unit {number}?" for number in range(12)]


def retrieval_chain(llm: Any, retrieve: Any = lambda inputs: "Brenvik is led by Sluba Merkast.") -> Any:
    """The shape of ``create_retrieval_chain``: the model is within an ``assign``."""
    prompt = ChatPromptTemplate.from_template("Context: {context}\n\n{input}")
    return RunnablePassthrough.assign(context=RunnableLambda(retrieve)).assign(answer=prompt | llm)


def sweeps_of(engine: LayerStream, work: Any) -> int:
    before = engine.stats().sweeps
    work()
    return engine.stats().sweeps - before


def test_a_retrieval_chain_in_a_gang_takes_the_sweeps_of_one_question() -> None:
    with LayerStream("demo", kv_store=None, progress=False, speculation="off") as engine:
        chain = retrieval_chain(ChatLayerStream(engine=engine, max_tokens=6, seed=1))
        inputs = [{"input": question} for question in QUESTIONS]
        alone = sweeps_of(engine, lambda: chain.invoke(inputs[0]))
        together = sweeps_of(engine, lambda: gang(chain).batch(inputs))
        assert together <= alone + 2
        answers = [result["answer"].content for result in gang(chain).batch(inputs)]
        assert answers == [chain.invoke(given)["answer"].content for given in inputs]


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
def test_the_models_own_batch_takes_the_sweeps_of_one_question(kind: Any) -> None:
    with LayerStream("demo", kv_store=None, progress=False, speculation="off") as engine:
        llm = kind(engine=engine, max_tokens=6, seed=1)
        alone = sweeps_of(engine, lambda: llm.invoke(QUESTIONS[0]))
        assert sweeps_of(engine, lambda: llm.batch(QUESTIONS)) <= alone + 2
        assert sweeps_of(engine, lambda: llm.batch(QUESTIONS, return_exceptions=True)) <= alone + 2


async def test_abatch_of_a_gang() -> None:
    engine = FakeEngine(has_chat_template=True)
    chain = gang(retrieval_chain(ChatLayerStream(engine=engine)))
    results = await chain.abatch([{"input": question} for question in QUESTIONS])
    assert len(results) == len(QUESTIONS)
    assert engine.gangs == [len(QUESTIONS)]


def test_who_fails_before_the_model_is_not_waited_for() -> None:
    def retrieve(inputs: dict[str, Any]) -> str:
        if "unit 3" in inputs["input"]:
            raise LookupError("no such unit")
        return "x"

    engine = FakeEngine(has_chat_template=True)
    chain = gang(retrieval_chain(ChatLayerStream(engine=engine), retrieve))
    results = chain.batch([{"input": question} for question in QUESTIONS], return_exceptions=True)
    assert [isinstance(result, LookupError) for result in results] == [n == 3 for n in range(12)]
    assert len(engine.left) + sum(12 - size for size in engine.gangs) == 12, "all twelve left, or had left before"
    with pytest.raises(LookupError):
        chain.batch([{"input": question} for question in QUESTIONS])


def test_one_that_fails_in_the_engine_does_not_take_the_others_along() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_tokens=2)
        results = llm.batch(["a", "word " * 5000, "b"], return_exceptions=True)
        assert [type(result) for result in results] == [str, results[1].__class__, str]
        assert isinstance(results[1], ValueError)


def test_max_concurrency_is_kept() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def watch(inputs: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return inputs

    gang(RunnableLambda(watch)).batch(list(range(12)), config={"max_concurrency": 3})
    assert most <= 3
    meeting = threading.Barrier(12)
    assert gang(RunnableLambda(lambda _: meeting.wait(60) >= 0)).batch(list(range(12))) == [True] * 12
    assert gang(RunnableLambda(watch)).batch([]) == []


def test_no_thread_is_left_behind() -> None:
    engine = FakeEngine(has_chat_template=True)
    llm = ChatLayerStream(engine=engine)
    before = threading.active_count()
    gang(llm | (lambda message: message.content)).batch(QUESTIONS)
    llm.batch(QUESTIONS)
    assert threading.active_count() == before
