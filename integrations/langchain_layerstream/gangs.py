"""Batches that reach the engine as one gang, whatever shape the chain has.

LangChain runs a batch on a pool of threads, a few at a time; a model in the middle of it sees its prompts come one by
one. Here every member of a batch has a thread, and a context variable, which LangChain hands down to whatever a member
runs, leads the wrappers in it to their batch: the first prompt that arrives opens a gang in its engine, so that none is
begun before all are there, or have ended without asking the model (a cache knew the answer, a retriever failed).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import get_config_list, get_executor_for_config
from langchain_core.runnables.utils import gather_with_concurrency

if TYPE_CHECKING:
    from layerstream.engine import LayerStream
    from layerstream.runtime.reception import OpenGang

MOST_THREADS = 256
PATIENCE_SECONDS = 2.0
"""How long prompts wait for members that are still retrieving; a sweep of a model that streams takes as long."""


class _Members:
    """The members of a batch: who is still to come to each engine that they use. Any thread may call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._gangs: dict[int, OpenGang] = {}
        self._open = contextlib.ExitStack()

    def join(self, engine: LayerStream) -> None:
        """A member is about to ask *engine*."""
        with self._lock:
            if id(engine) not in self._gangs:
                self._gangs[id(engine)] = self._open.enter_context(engine.gang(self._size, PATIENCE_SECONDS))

    def leave(self) -> None:
        """A member has ended, whether it asked or not."""
        with self._lock:
            self._size -= 1
            gangs = list(self._gangs.values())
        for gang in gangs:
            gang.leave()

    def close(self) -> None:
        """Nobody comes any more."""
        self._open.close()


_members: ContextVar[_Members | None] = ContextVar("layerstream_batch", default=None)


def join_gang(engine: LayerStream) -> None:
    """Called by a wrapper before it submits: waits for the rest of the batch that this call belongs to, if any."""
    members = _members.get()
    if members is not None:
        members.join(engine)


@contextlib.contextmanager
def _batch_of(size: int) -> Iterator[_Members]:
    members = _Members(size)
    token = _members.set(members)
    try:
        yield members
    finally:
        _members.reset(token)
        members.close()


def run_batch(
    invoke: Callable[..., Any],
    inputs: Sequence[Any],
    config: RunnableConfig | list[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    **kwargs: Any,
) -> list[Any]:
    """``[invoke(input, config) for input in inputs]``, all at once and as one gang; ``max_concurrency`` is kept."""
    if not inputs:
        return []
    configs = get_config_list(config, len(inputs))
    width = min(len(inputs), configs[0].get("max_concurrency") or MOST_THREADS)
    with _batch_of(width) as members:

        def run(given: Any, own: RunnableConfig) -> Any:
            try:
                return invoke(given, own, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                return error
            finally:
                members.leave()

        with get_executor_for_config({"max_concurrency": width}) as executor:
            return list(executor.map(run, inputs, configs))


async def run_abatch(
    ainvoke: Callable[..., Coroutine[Any, Any, Any]],
    inputs: Sequence[Any],
    config: RunnableConfig | list[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    **kwargs: Any,
) -> list[Any]:
    """:func:`run_batch` on the event loop."""
    if not inputs:
        return []
    configs = get_config_list(config, len(inputs))
    limit = configs[0].get("max_concurrency")
    with _batch_of(min(len(inputs), limit or len(inputs))) as members:

        async def run(given: Any, own: RunnableConfig) -> Any:
            try:
                return await ainvoke(given, own, **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                return error
            finally:
                members.leave()

        return await gather_with_concurrency(limit, *map(run, inputs, configs))


class Gang(RunnableBindingBase):  # type: ignore[type-arg]
    """A chain whose batches share every sweep; see :func:`gang`."""

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[Any]:
        """As the chain's, with a thread for each input."""
        return run_batch(super().invoke, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[Any]:
        """As the chain's, all inputs at once."""
        return await run_abatch(super().ainvoke, inputs, config, return_exceptions=return_exceptions, **kwargs)


def gang(chain: Runnable[Any, Any]) -> Gang:
    """*chain*, with batches that reach the model together, whatever stands around it.

    The models' own ``batch``, and that of ``prompt | model | parser``, do so by themselves. Chains within chains (what
    ``create_retrieval_chain`` makes, ``RunnablePassthrough.assign``, branches) are run a few at a time by LangChain::

        answers = gang(chain).batch(questions)
    """
    return Gang(bound=chain, kwargs={}, config={})
