"""How much a chat template may do: bounds on what it makes, and on how long it takes.

A template comes with the checkpoint and is hostile input. Three rules bound it in any thread, without a process of its
own. (1) No value is larger than :data:`VALUE_LIMIT`, and what could make a larger one is refused before it runs: so no
single step takes long. (2) All values that one rendering makes are together no larger than :data:`TOTAL_LIMIT`: so
memory is bounded, whatever is kept. (3) The thread's processor time is looked at in every step: so is time.

A :class:`Meter` belongs to one rendering and its thread.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from layerstream.text.traced import SAID, Traced

VALUE_LIMIT = 2**24  # characters and items: four times the longest context that a model has, in characters
TOTAL_LIMIT = 2**26  # characters; an item of a list counts as
ITEM_CHARACTERS = 8
SECONDS_LIMIT = 1.0  # of the thread's processor time; the templates in use take 0.1 to 5 ms
DEPTH_LIMIT = 60  # calls within calls; the templates in use go down some 5, and each takes several Python frames
INTEGER_BITS = 2**12
INDENT_LIMIT = 16


class TemplateLimit(Exception):
    """A template wants more than it may have."""


class Meter:
    """What one rendering has made so far."""

    def __init__(self) -> None:
        self._made = 0
        self._depth = 0
        self._deadline = time.thread_time() + SECONDS_LIMIT
        self._weighed: dict[int, tuple[Any, int, bool]] = {}  # containers by id, which keeping them keeps theirs

    def step(self) -> None:
        """Look at the clock."""
        if time.thread_time() > self._deadline:
            raise TemplateLimit(f"it takes more than {SECONDS_LIMIT:g} seconds")

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within it, a call runs."""
        self.step()
        if self._depth >= DEPTH_LIMIT:
            raise TemplateLimit(f"it calls itself more than {DEPTH_LIMIT} levels deep")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def allow(self, size: int) -> None:
        """Refuse a value of *size* before it is made."""
        if size > VALUE_LIMIT:
            raise TemplateLimit(f"it makes a value of {size:,} characters or items; {VALUE_LIMIT:,} are allowed")

    def take(self, value: Any) -> Any:
        """*value*, which was just made."""
        self.step()
        self.allow(self.weigh(value)[0])
        if isinstance(value, list | tuple | dict):
            self._made += ITEM_CHARACTERS * len(value)
        else:
            self._made += len(value) if isinstance(value, str | bytes) else 1
        if self._made > TOTAL_LIMIT:
            raise TemplateLimit(f"it makes more than {TOTAL_LIMIT:,} characters")
        return value

    def holds_said(self, values: Iterable[Any]) -> bool:
        """Whether something in *values* was said to the template."""
        return any(self.weigh(value)[1] for value in values)

    def weigh(self, value: Any) -> tuple[int, bool]:
        """Characters and items in *value*, as many as there would be if it were printed; whether some were said."""
        if isinstance(value, str):
            return len(value), isinstance(value, Traced) and SAID in value._origin
        if not isinstance(value, list | tuple | dict):
            return len(value) if isinstance(value, bytes | range) else 1, False
        known = self._weighed.get(id(value))
        if known is None:
            items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
            weights = [self.weigh(item) for item in items]
            total = 1 + len(weights) + sum(weight for weight, _ in weights)
            known = self._weighed[id(value)] = value, total, any(said for _, said in weights)
        return known[1], known[2]


def check_operation(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Refuse a binary operation whose result would be too large."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _allow_bits(left.bit_length() * abs(right))
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _allow_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int) or isinstance(right, int):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            meter.allow(meter.weigh(value)[0] * max(0, count))
    elif operator == "%" and isinstance(left, str | bytes):
        meter.allow(_formatted_size(meter, str(left), "%", (right,)))


def check_method(meter: Meter, name: str, receiver: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a text's method whose result would be too large; the others' are no larger than the text."""
    if isinstance(receiver, str | bytes) and name in _TEXT_METHODS:
        meter.allow(_TEXT_METHODS[name](meter, receiver, *args, *kwargs.values()))
    elif name in _REFUSED_METHODS:
        raise TemplateLimit(f"it calls {name}(), which no chat needs")


def check_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter whose result would be too large; those that are not here make nothing larger."""
    if name == "tojson":
        if any(_number(value) > INDENT_LIMIT for value in (*args, *kwargs.values())):
            raise TemplateLimit(f"it indents by more than {INDENT_LIMIT}")
    elif name in _FILTERS:
        meter.allow(_FILTERS[name](meter, value, *args, *kwargs.values()))


def _allow_bits(num_bits: int) -> None:
    if num_bits > INTEGER_BITS:
        raise TemplateLimit(f"it computes with integers of {num_bits:,} bits; {INTEGER_BITS:,} are allowed")


def _number(value: Any) -> int:
    """*value* as a width or a count."""
    return max(0, value) if isinstance(value, int) else len(value) if isinstance(value, str | bytes) else 0


def _replaced_size(meter: Meter, text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    found = text.count(old) if isinstance(old, str | bytes) else 0
    return len(text) + found * _number(new)


def _joined_size(meter: Meter, separator: Any, parts: Any = (), *_: Any) -> int:
    weight = meter.weigh(parts)[0]
    return weight * (1 + len(separator))


def _padded_size(meter: Meter, text: Any, *args: Any) -> int:
    return len(text) + max(map(_number, args), default=0)


def _tabbed_size(meter: Meter, text: Any, *args: Any) -> int:
    return len(text) * (1 + max(map(_number, args), default=8))


def _formatted_size(meter: Meter, form: str, mark: str, args: tuple[Any, ...]) -> int:
    """A bound on what a format string makes: each field is as wide as the widest value, or as a number says."""
    widths = [int(number[:18]) for number in re.findall(r"\d+", form)]
    if "*" in form or re.search(r"\{[^{}]*\{", form):
        widths += [_number(arg) for value in args for arg in (value if isinstance(value, tuple) else (value,))]
    widest = max([sum(meter.weigh(arg)[0] for arg in args), *widths])
    return len(form) + form.count(mark) * widest


def _text_formatted_size(meter: Meter, form: Any, *args: Any) -> int:
    return _formatted_size(meter, str(form), "{", args)


_TEXT_METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced_size,
    "join": _joined_size,
    "center": _padded_size,
    "ljust": _padded_size,
    "rjust": _padded_size,
    "zfill": _padded_size,
    "expandtabs": _tabbed_size,
    "format": _text_formatted_size,
    "format_map": _text_formatted_size,
}
_REFUSED_METHODS = frozenset({"translate", "to_bytes"})
_FILTERS: dict[str, Callable[..., int]] = {
    "replace": lambda meter, value, *args: _replaced_size(meter, str(value), *args),
    "join": lambda meter, value, separator="", *_: _joined_size(meter, str(separator), value),
    "center": lambda meter, value, *args: _padded_size(meter, str(value), *args),
    "indent": lambda meter, value, width=4, *_: (str(value).count("\n") + 2) * _number(width) + len(str(value)),
    "format": lambda meter, value, *args: _formatted_size(meter, str(value), "%", args),
    "batch": lambda meter, value, count=1, *_: _number(count),
    "slice": lambda meter, value, count=1, *_: _number(count),
    "truncate": lambda meter, value, *args: len(str(value)) + max(map(_number, args), default=0),
}
REFUSED_FILTERS = ("lipsum", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Those that grow in other ways, or that make a prompt differ from time to time."""
