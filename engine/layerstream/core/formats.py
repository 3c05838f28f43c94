"""The formats that ``quantization=`` makes: a row each. Whoever has to know what there is asks this table.

To add one: a row here, an encoder of its name in :mod:`layerstream.checkpoint.codecs.encode`, and, if nothing reads it
yet, a codec beside it and a finder in :mod:`layerstream.checkpoint.packed`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: as users say it, and as its codec is called.
        bits: per weight, scales included.
        most_error: root mean square of what packing may change in a matrix, relative; more is a mistake.
        kernel: what multiplies by it undecoded; ``""``: nothing does.
        packs_experts: whether experts are packed too.
    """

    name: str
    bits: float
    most_error: float
    kernel: str = ""
    packs_experts: bool = False


FORMATS = {
    row.name: row
    for row in (
        Format("nf4", bits=4.13, most_error=0.2),
        Format("int8", bits=8.02, most_error=0.03, kernel="int8"),
        Format("int4", bits=4.25, most_error=0.2, kernel="int4", packs_experts=True),
    )
}
KERNELS = {row.kernel: row for row in FORMATS.values() if row.kernel}
"""By the kernel that multiplies by it."""
