"""The models that the stages measure, and the budgets that they have: on a card, and tiny ones to try the stages with.

Models are grown ones (:mod:`benchmarks.grow`), which have the cost of their shape and give right answers. Those too
large to be written within minutes have fewer layers than their name says; the table says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """A grown model; *layers* of *of* that its shape has."""

    shape: str
    quantization: str | None = None
    layers: int | None = None
    of: int | None = None

    def arguments(self) -> list[str]:
        """Of :mod:`benchmarks.grow`, behind its shape and folder."""
        found = [] if self.quantization is None else ["--quantization", self.quantization]
        return found if self.layers is None else [*found, "--layers", str(self.layers)]

    def __str__(self) -> str:
        said = f"{self.shape} {self.quantization or 'bf16'}"
        return said if self.layers is None else f"{said}, {self.layers} of {self.of} layers"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured with what.

    Attributes:
        models: by the name that stages have for them.
        memory: of the device, by the same names.
        host_memory: behind it.
        sequences: in a sweep.
        steps: tokens that are generated while a sweep is timed.
        prefills: lengths of prompts.
        is_pretended: there is no card, and a pretended one computes.
    """

    models: dict[str, Model]
    memory: dict[str, str]
    host_memory: str
    sequences: tuple[int, ...]
    steps: int
    prefills: tuple[int, ...]
    is_pretended: bool = False


CARD = Setting(
    models={
        "dense": Model("3B"),
        "dense-nf4": Model("3B", "nf4"),
        "mixture": Model("Qwen3-30B-A3B", "int4", 16, 48),
        "large": Model("70B", "nf4", 40, 80),
    },
    memory={"dense": "1.5GiB", "dense-nf4": "1.5GiB", "mixture": "4GiB", "large": "3.25GiB"},
    host_memory="48GiB",
    sequences=(1, 8, 32, 128),
    steps=8,
    prefills=(512, 1900),
)

_TINY = "256,512,4,8,4,1200"

TINY = Setting(
    models={
        "dense": Model(_TINY),
        "dense-nf4": Model(_TINY, "nf4"),
        "mixture": Model("tiny-moe", "int4"),
        "large": Model(_TINY, "nf4"),
    },
    memory={"dense": "4MiB", "dense-nf4": "4MiB", "mixture": "8MiB", "large": "4MiB"},
    host_memory="256MiB",
    sequences=(1, 2),
    steps=2,
    prefills=(40,),
    is_pretended=True,
)
