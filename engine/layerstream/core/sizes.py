"""Byte sizes as people write them, ``"3GiB"`` ↔ ``3221225472``, and the one that everything is a multiple of."""

from __future__ import annotations

import re

from layerstream.api.arguments import plain
from layerstream.errors import InvalidSize, shown

PAGE = 4096  # bytes; direct I/O needs offsets, lengths and addresses that are multiples of it
_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10, "kib": 2**10, "kb": 10**3,
    "m": 2**20, "mib": 2**20, "mb": 10**6,
    "g": 2**30, "gib": 2**30, "gb": 10**9,
    "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip
MOST_BYTES = 2**60
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes meant by *size*: an int, or a number with a unit (``"512MiB"``, ``"3g"``, ``"1.5 GB"``).

    ``K``, ``M``, ``G``, ``T`` alone are binary. Raises :class:`InvalidSize`.
    """
    size = plain(size)
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InvalidSize(f"a size is an int or a string such as '3GiB', not {shown(size)}")
    num_bytes = size if isinstance(size, int) else _parse(size)
    if not 1 <= num_bytes < MOST_BYTES:
        raise InvalidSize(f"a size is positive and less than {format_size(MOST_BYTES)}, not {shown(size)}")
    return int(num_bytes)


def _parse(size: str) -> float:
    match = _SIZE.fullmatch(size)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidSize(f"cannot read {shown(size)} as a size; write for example '3GiB', '512MiB' or '2.5GB'")
    return float(match[1]) * unit


def format_size(num_bytes: float, *, exact: bool = False) -> str:
    """*num_bytes* for people: ``"3.0 GiB"``; with *exact*, rounded up so that it parses to at least as much."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            if exact:
                smaller = unit // 1024  # one unit down keeps the rounding under 0.1 %
                names = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "B"}
                return f"{-(-int(num_bytes) // smaller)}{names[smaller]}"
            return f"{num_bytes / unit:.1f} {name}"
    return f"{int(num_bytes)}B" if exact else f"{int(num_bytes)} B"
