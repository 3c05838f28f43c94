"""What a caller passes, checked where it enters: on the caller's thread, before anything is begun.

Each function takes the name that the caller knows the value by, and returns the value as a plain Python one: what
NumPy or torch hold as a scalar counts as the number it is, and nobody's own class goes on to the engine's thread. What
is refused is said with the name, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from layerstream.errors import ConfigurationError, shown

LONGEST_WAIT = threading.TIMEOUT_MAX
"""Seconds that the system can wait at most: some 292 years."""

Refusal = Callable[[str, object, str], ConfigurationError]


def refusal(name: str, value: object, expected: str) -> ConfigurationError:
    """The error that says so."""
    return ConfigurationError(f"{name} is {shown(value)}; expected {expected}")


def plain(value: Any) -> Any:
    """*value*, or the Python value of a scalar of NumPy or torch."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        return item()
    return value


def whole_number(name: str, value: Any, low: int, high: int | None = None, refuse: Refusal = refusal) -> int:
    """*value* as an int in [*low*, *high*]."""
    value = plain(value)
    found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if found is None or found < low or (high is not None and found > high):
        expected = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
        raise refuse(name, value, expected)
    return found


def number(
    name: str,
    value: Any,
    low: float,
    high: float | None = None,
    *,
    above_low: bool = False,
    refuse: Refusal = refusal,
) -> float:
    """*value* as a finite float in [*low*, *high*]; with *above_low*, more than *low*."""
    value = plain(value)
    converted = _as_float(value)
    if (
        converted is None
        or not math.isfinite(converted)
        or converted < low
        or (above_low and converted == low)
        or (high is not None and converted > high)
    ):
        sign, bracket = (">", "(") if above_low else (">=", "[")
        expected = f"a number {sign} {low:g}" if high is None else f"a number in {bracket}{low:g}, {high:g}]"
        raise refuse(name, value, expected)
    return converted


def seconds(name: str, value: Any, *, above_zero: bool = False) -> float | None:
    """*value* as seconds to wait; ``None``, and infinity: for ever."""
    value = plain(value)
    if value is None or (isinstance(value, float) and value == math.inf):
        return None
    expected = f"a number of seconds {'>' if above_zero else '>='} 0, or None"
    found = number(name, value, 0.0, above_low=above_zero, refuse=lambda name, value, _: refusal(name, value, expected))
    return min(found, LONGEST_WAIT)


def flag(name: str, value: Any, refuse: Refusal = refusal) -> bool:
    """*value* as True or False."""
    value = plain(value)
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """*value*, which is one of *choices*: strings, whole numbers, ``None``."""
    value, choices = plain(value), list(choices)
    if not isinstance(value, str | int | None) or isinstance(value, bool) or value not in choices:
        raise refusal(name, value, f"one of {', '.join(map(repr, choices))}")
    return value


def text(name: str, value: Any, *, may_be_empty: bool = True) -> str:
    """*value* as a str."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise refusal(name, value, "a string" if may_be_empty else "a string that is not empty")
    return str.__str__(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """*value*, a list of texts.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise refusal(name, value, "a list of texts")
    return tuple(text(name, item) for item in value)


def function(name: str, value: Any) -> Callable[..., Any]:
    """*value*, which can be called."""
    if not callable(value):
        raise refusal(name, value, "a function")
    return value


def suggestion(name: object, known: Iterable[str], habits: Mapping[str, str] | None = None) -> str:
    """What *name* may have been meant for: what *habits* of others say, or the closest of *known*; else all of them."""
    known = sorted(known)
    if isinstance(name, str):
        if habits is not None and name in habits:
            return f"; use {habits[name]}"
        if close := difflib.get_close_matches(name, known, 1):
            return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}"


def _as_float(value: Any) -> float | None:
    """*value* as a float; ``None``: it is no number, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None
