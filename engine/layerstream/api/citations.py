"""Answers that cite passages of their prompt by number, and no others: ``[2]``. Pure.

The grammar sees to it: a bracket opens only for a number that is there. Who reads an answer need not check it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from layerstream.errors import ConfigurationError, shown

_CITED = re.compile(r"\s?\[(\d{1,9})\]")
_NUMBER = re.compile(r"\[(\d+)\]")
MOST_PASSAGES = 1000


@dataclass(frozen=True, slots=True)
class Citations:
    """What an answer says, and what it cites.

    Attributes:
        text: the answer without its citations.
        ids: the numbers that it cites, each once, in order.
    """

    text: str
    ids: tuple[int, ...]


def citation_format(ids: Iterable[int], *, required: bool = True) -> dict[str, Any]:
    """The response format of an answer that cites passages with *ids* alone.

    Args:
        required: it ends with a citation, so that nothing is said without one.

    Raises:
        ConfigurationError: no ids, too many, or something else than whole numbers.
    """
    numbers = list(dict.fromkeys(ids))
    if not 1 <= len(numbers) <= MOST_PASSAGES or any(type(number) is not int or number < 0 for number in numbers):
        raise ConfigurationError(
            f"ids are {shown(numbers)}; expected 1 to {MOST_PASSAGES} whole numbers: those of passages in the prompt"
        )
    cited = rf"\[({'|'.join(map(str, numbers))})\]"
    said = r"[^\[\]]"
    pattern = rf"{said}+({cited}{said}*)*{cited}\.?" if required else rf"({said}|{cited})+"
    return {"type": "regex", "regex": pattern}


def read_citations(answer: str, ids: Iterable[int] | None = None) -> Citations:
    """What *answer* says, and which numbers it cites.

    Args:
        ids: those that count; ``None``: all. (An answer that was not held to :func:`citation_format` may cite others.)
    """
    known = None if ids is None else set(ids)
    found = dict.fromkeys(int(number) for number in _CITED.findall(answer))
    return Citations(_CITED.sub("", answer).strip(), tuple(one for one in found if known is None or one in known))


def number_passages(texts: Iterable[str], *, separator: str = "\n\n") -> str:
    """*texts* as one context, each behind its number from 1 on, as :func:`without_numbers` has them."""
    return separator.join(f"[{number}] {text}" for number, text in enumerate(without_numbers(texts), start=1))


def without_numbers(texts: Iterable[str]) -> list[str]:
    """*texts* as they stand in a context of numbered passages: numbers in brackets that they have themselves are in
    parentheses, so that none of them looks like a passage."""
    return [_NUMBER.sub(r"(\1)", text) for text in texts]
