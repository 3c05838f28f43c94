"""How far two tensors are from each other, in multiples of what rounding may do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.comparing.judging import AGREES, Tolerance

_LEAST = 1e-30  # where all is zero, nothing may differ


@dataclass(frozen=True, slots=True)
class Difference:
    """Of each row ``(rows,)`` the largest difference: as a multiple of what rounding may do, and relative to the row's
    root mean square."""

    excess: torch.Tensor
    apart: torch.Tensor

    @property
    def worst_row(self) -> int:
        """The row that is off the most."""
        return int(self.excess.argmax())

    @property
    def worst(self) -> float:
        """By how much."""
        return float(self.excess.max())

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all of it."""
        return self.worst <= AGREES


def difference(
    found: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, entering: torch.Tensor | None = None
) -> Difference:
    """Of *found* from *expected*, both ``(rows, width)``; what is no number differs by infinity.

    Args:
        entering: of a decoder layer, what it adds to: its own part may be small beside that, and is looked at alone.
    """
    found, expected = found.float(), expected.float()
    added, sizes = expected, expected.abs()
    if entering is not None and entering.shape == expected.shape:
        added, sizes = expected - entering.float(), sizes + entering.float().abs()
    off = (found - expected).abs()
    allowed = tolerance.share * root_mean_square(added) + tolerance.roundings * sizes
    excess = (off / allowed.clamp_min(_LEAST)).amax(1)
    apart = (off / root_mean_square(added).clamp_min(_LEAST)).amax(1)
    return Difference(excess.nan_to_num(nan=torch.inf), apart.nan_to_num(nan=torch.inf))


def drift(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of the rows' differences as wholes, relative to the rows."""
    off = root_mean_square(found.float() - expected.float())
    return float((off / root_mean_square(expected.float()).clamp_min(_LEAST)).nan_to_num(nan=torch.inf).max())


def root_mean_square(rows: torch.Tensor) -> torch.Tensor:
    """``(rows, 1)``."""
    return rows.square().mean(1, keepdim=True).sqrt()


def rerouted(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], tolerance: Tolerance
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``(rows,)`` that were sent to other experts than expected: those where it is a tie, and those where not.

    Both are the experts of each row and their weights, ``(rows, k)``. It is a tie where the experts that only one side
    has are the least of those that it chose, and all others weigh the same on both: the router found the last of its
    choice and the next one as good as equal.
    """
    num_experts = 1 + int(max(found[0].max(), expected[0].max()))
    ours, theirs = (_by_expert(*routes, num_experts) for routes in (found, expected))
    alone = ours.isnan() != theirs.isnan()
    largest = expected[1].float().abs().amax(1, keepdim=True)
    least = torch.minimum(*(routes[1].float().amin(1, keepdim=True) for routes in (found, expected)))
    of_alone = torch.where(ours.isnan(), theirs, ours) - least
    off = torch.where(alone, of_alone, ours - theirs).abs().nan_to_num(nan=0.0)
    other = alone.any(1)
    is_tie = (off <= tolerance.share * largest).all(1)
    return other & is_tie, other & ~is_tie


def _by_expert(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``(rows, experts)``: their weights, and NaN for experts that were not chosen."""
    empty = torch.full((len(index), num_experts), torch.nan)
    return empty.scatter(1, index.long(), weights.float())
