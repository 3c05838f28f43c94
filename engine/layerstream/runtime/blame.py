"""Whose an error is: one rule for the engine's thread. Pure; the loop asks, and acts on the verdict.

| what the thread was doing | who pays for an error in it |
|---|---|
| something of one request: taking it in, drawing, searching, telling it | that request |
| computing a sweep | the requests that the sweep carried, or those whose rows were at fault |
| guessing what comes next | nobody: there are no guesses any more |
| keeping the books of all: who waits, who runs, whose pages | all requests that were taken in: the books begin anew |
| beginning the books anew | the engine |

An accelerator that is lost takes the engine with it, whatever was being done; and where the engine is ending anyway,
nothing else is to be decided. A store and a listener are not in the table: neither raises here
(:mod:`layerstream.kv.prefix`, :mod:`layerstream.progress`).
"""

from __future__ import annotations

from enum import Enum, auto

from layerstream.errors import DeviceLost, EngineClosed


class Doing(Enum):
    """What the engine's thread was doing."""

    REQUEST = auto()
    SWEEP = auto()
    GUESSES = auto()
    BOOKS = auto()
    NEW_BOOKS = auto()


class Victims(Enum):
    """Who ends with an error; everybody else goes on."""

    NOBODY = auto()
    REQUESTS = auto()
    ALL_REQUESTS = auto()
    ENGINE = auto()


_VICTIMS = {
    Doing.REQUEST: Victims.REQUESTS,
    Doing.SWEEP: Victims.REQUESTS,
    Doing.GUESSES: Victims.NOBODY,
    Doing.BOOKS: Victims.ALL_REQUESTS,
    Doing.NEW_BOOKS: Victims.ENGINE,
}


def blame(doing: Doing, *, is_device_lost: bool, is_ending: bool) -> Victims:
    """Who ends with an error that was met while *doing* something."""
    return Victims.ENGINE if is_device_lost or is_ending else _VICTIMS[doing]


def lost(error: BaseException) -> DeviceLost:
    """What everybody is told when an accelerator is gone."""
    said = DeviceLost(
        f"the accelerator failed and will not compute again in this process: {error}; what the KV store has is kept: "
        "start a new process, and look at the driver's log (dmesg, nvidia-smi) if it happens again"
    )
    said.__cause__ = error
    return said


def ended(error: BaseException) -> EngineClosed:
    """What everybody is told when the engine cannot go on."""
    said = EngineClosed(
        f"the engine came to an end because of {type(error).__name__}: {error}; make a new LayerStream, and report "
        "what the log says, for this is a fault of the engine"
    )
    said.__cause__ = error
    return said
