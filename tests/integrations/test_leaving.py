"""Whoever leaves takes the request along: by the next sweep it is gone, and no thread stays behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_layerstream import ChatLayerStream
from langchain_layerstream import LayerStreamLLM as LangChainLLM
from layerstream import LayerStream, SamplingParams
from llama_index.core.llms import ChatMessage
from llama_index.llms.layerstream import LayerStreamLLM as LlamaIndexLLM

LONG = {"max_tokens": 500, "ignore_eos": True}
SHORT = SamplingParams(max_tokens=2)
QUESTION = "the quick brown fox"


async def cancel(call: Any) -> None:
    """Cancel *call* when it is under way."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def abandon(stream: Any) -> None:
    """Take one piece of *stream* and go."""
    async for _ in stream:
        break
    await stream.aclose()


async def time_out(call: Any) -> None:
    """As a client with a time-out."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.3)


def abandon_sync(stream: Any) -> None:
    next(iter(stream))
    stream.close()


async def chat_cancelled(engine: LayerStream) -> None:
    await cancel(ChatLayerStream(engine=engine).ainvoke(QUESTION, **LONG))


async def chat_abandoned(engine: LayerStream) -> None:
    await abandon(ChatLayerStream(engine=engine).astream(QUESTION, **LONG))


async def chat_timed_out(engine: LayerStream) -> None:
    await time_out(ChatLayerStream(engine=engine).ainvoke(QUESTION, **LONG))


async def chat_abandoned_sync(engine: LayerStream) -> None:
    await asyncio.to_thread(abandon_sync, ChatLayerStream(engine=engine).stream(QUESTION, **LONG))


async def chat_batch_cancelled(engine: LayerStream) -> None:
    await cancel(ChatLayerStream(engine=engine).abatch([QUESTION] * 3, **LONG))


async def llm_cancelled(engine: LayerStream) -> None:
    await cancel(LangChainLLM(engine=engine).ainvoke(QUESTION, **LONG))


async def llm_abandoned(engine: LayerStream) -> None:
    await abandon(LangChainLLM(engine=engine).astream(QUESTION, **LONG))


async def llama_index_cancelled(engine: LayerStream) -> None:
    await cancel(LlamaIndexLLM(engine=engine).achat([ChatMessage(content=QUESTION)], **LONG))


async def llama_index_abandoned(engine: LayerStream) -> None:
    await abandon(await LlamaIndexLLM(engine=engine).astream_complete(QUESTION, **LONG))


async def llama_index_abandoned_sync(engine: LayerStream) -> None:
    stream = LlamaIndexLLM(engine=engine).stream_chat([ChatMessage(content=QUESTION)], **LONG)
    await asyncio.to_thread(abandon_sync, stream)


WAYS: list[Callable[[LayerStream], Any]] = [
    chat_cancelled, chat_abandoned, chat_timed_out, chat_abandoned_sync, chat_batch_cancelled, llm_cancelled,
    llm_abandoned, llama_index_cancelled, llama_index_abandoned, llama_index_abandoned_sync,
]  # fmt: skip


@pytest.mark.parametrize("leave", WAYS)
async def test_by_the_next_sweep_it_is_gone(leave: Callable[[LayerStream], Any], engine: LayerStream) -> None:
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(40)))  # the event loop's pool is full
    engine.generate("warm up", SHORT)
    threads = threading.active_count()
    await leave(engine)
    sweeps, scheduler = engine.stats().sweeps, engine._parts.scheduler
    deadline = time.monotonic() + 20
    while scheduler.num_running + scheduler.num_waiting and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert scheduler.num_running + scheduler.num_waiting == 0
    assert engine.stats().sweeps <= sweeps + 2, "the one under way, and none after it but by chance"
    scheduler.check_integrity()
    assert threading.active_count() <= threads
    assert engine.generate("and the engine goes on", SHORT)[0].finish_reason in ("stop", "length")


def test_an_engine_closes_when_its_last_wrapper_is_gone() -> None:
    def run() -> int:
        first = ChatLayerStream(model="demo", engine_kwargs={"kv_store": None, "max_context": 777}, max_tokens=2)
        second = LlamaIndexLLM(model="demo", engine_kwargs={"kv_store": None, "max_context": 777}, max_new_tokens=2)
        first.invoke(QUESTION)
        second.complete(QUESTION)
        assert first._handle.get() is second._handle.get()
        return threading.active_count()

    gc.collect()
    before = threading.active_count()
    within = run()
    gc.collect()
    assert threading.active_count() < within
    assert threading.active_count() <= before
