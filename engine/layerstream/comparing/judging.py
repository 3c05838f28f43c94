"""What counts as a difference, where the first one is, and what it means: pure, no tensor in sight.

Both sides round. So a number agrees that is no further off than the roundings of its own dtype can bring it: some
roundings of what it is itself, and a share of what is usual in its row (the root mean square), because it is a sum of
products of that size. How far off something is, is said as a multiple of that: up to 1 it agrees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

AGREES = 1.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What rounding may do in one dtype.

    Attributes:
        roundings: of a number itself, relative to it.
        share: of the root mean square of what a module adds in its row, that sums of products may be off.
        tie: of the largest logit, that the best two tokens may be apart and still change places.
    """

    roundings: float
    share: float
    tie: float


TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(roundings=2**-18, share=1e-4, tie=1e-4),
    "float16": Tolerance(roundings=2**-7, share=2**-5, tie=2**-8),
    "bfloat16": Tolerance(roundings=2**-4, share=2**-2, tie=2**-5),
}
"""Small random models of all tested families stay below a thirtieth of it in float32, where both sides only add in
another order, and below two thirds in the others. There most of it is attention's: a score of 64 is rounded
to a quarter in bfloat16, and the softmax makes a factor of that. So float32 finds what bfloat16 has no room for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How far what comes out of a module is from plain transformers', given what went into it here.

    Attributes:
        module: its path; ``"embedding"`` and ``"logits"`` are the ends.
        excess: the largest difference, as a multiple of what rounding may do.
        apart: the largest difference, relative to the root mean square of its row.
        position: of the token whose row has it.
        drift: of plain transformers' own run, in which all differences so far add up: relative to the row.
        num_ties: rows that a router sent to other experts, which were as good.
        num_misrouted: rows that it sent to others, which were not.
    """

    module: str
    excess: float
    apart: float
    position: int
    drift: float
    num_ties: int = 0
    num_misrouted: int = 0

    @property
    def agrees(self) -> bool:
        """Whether rounding explains it."""
        return self.excess <= AGREES


@dataclass(frozen=True, slots=True)
class Choice:
    """A token of the answer: what the engine chose, and what plain transformers would have, after the same tokens.

    Attributes:
        position: in prompt and answer together.
        gap: by how much plain transformers' logit of its own token is above that of the engine's.
        share: *gap* relative to the largest logit.
    """

    position: int
    engine: int
    plain: int
    gap: float
    share: float

    @property
    def agrees(self) -> bool:
        """Whether it is the same token."""
        return self.engine == self.plain


@dataclass(frozen=True, slots=True)
class Call:
    """A module within a layer, as it was called on both sides; ``None``: it cannot be told."""

    path: str
    input_agrees: bool | None
    output_agrees: bool | None


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first module whose input agrees and whose output does not.

    Attributes:
        between: of its own modules the last that agrees and the first that was given something else, where what it
            computes itself between these two is wrong.
        experts: those that all differing rows, and no others, are routed to.
    """

    path: str
    between: tuple[str, str] | None = None
    experts: tuple[int, ...] = ()


Outcome = Literal["same", "tie", "rounding", "different"]


def first_difference(findings: Iterable[Finding]) -> Finding | None:
    """The first that rounding does not explain."""
    return next((finding for finding in findings if not finding.agrees), None)


def find_culprit(calls: Sequence[Call]) -> Culprit | None:
    """The first of *calls*, in the order in which they returned, whose input agrees and whose output does not.

    A module returns after those within it, so it is the innermost one.
    """
    for at, call in enumerate(calls):
        if call.input_agrees and call.output_agrees is False:
            return Culprit(call.path, _between(call.path, calls[:at]))
    return None


def _between(path: str, returned: Sequence[Call]) -> tuple[str, str] | None:
    """Where within *path* things go wrong, if it is between two of its modules."""
    prefix = f"{path}." if path else ""
    within = [call for call in returned if call.path.startswith(prefix)]
    wrong = next((at for at, call in enumerate(within) if call.input_agrees is False), None)
    if not wrong:
        return None
    return within[wrong - 1].path, within[wrong].path


def suspects(routes: Sequence[Collection[int]], differs: Sequence[bool]) -> tuple[int, ...]:
    """The experts that every row that differs is routed to, and no row that does not.

    Args:
        routes: the experts of each row.
    """
    wrong = [set(experts) for experts, is_wrong in zip(routes, differs, strict=True) if is_wrong]
    cleared = {expert for experts, is_wrong in zip(routes, differs, strict=True) if not is_wrong for expert in experts}
    return tuple(sorted(set.intersection(*wrong) - cleared)) if wrong else ()


def judge(findings: Iterable[Finding], choices: Iterable[Choice], tolerance: Tolerance) -> Outcome:
    """What the comparison came to.

    Modules that all agree and a token that does not: a tie where the two tokens are as good as equal, else roundings
    that add up from layer to layer.
    """
    if first_difference(findings) is not None:
        return "different"
    other = [choice for choice in choices if not choice.agrees]
    if not other:
        return "same"
    return "tie" if all(choice.share <= tolerance.tie for choice in other) else "rounding"
