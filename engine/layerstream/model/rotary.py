"""Rotary positions of queries and keys in four launches, on a device.

Whatever a family's function is called, and in whichever order it keeps a head: a value becomes its product with one
number plus that of its partner with another. Which numbers, the function says itself: heads that are one at the first
place of every pair, and heads that are one at the second, come out as them. It is asked once for the sines and cosines
of a sweep; from then on heads are multiplied by what it said. Which :class:`Pairing` it has is found by a probe on the
processor when it first meets heads of their shape. A function that has none computes by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias, TypeGuard

import torch

from layerstream.model.context import current
from layerstream.model.hooks import call_instead

Function: TypeAlias = Callable[..., Any]
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

PREFIX = "apply_rotary"
"""How such functions are called, everywhere in transformers."""

_PROBED_ROWS = 3
_AXIS = inspect.Parameter("unsqueeze_dim", inspect.Parameter.KEYWORD_ONLY, default=1)
_FP32_TOLERANCE = 1e-5
_ROUNDINGS = 2  # of the compute dtype, at the largest value


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which places of a head are rotated with each other.

    Attributes:
        firsts: of each pair of ``rotated`` places the first.
        arranged: heads ``(…, width)`` in the order in which they are returned; ``(…, k, width / k)`` is as good.
        swapped: those with every rotated value at its partner's place.
    """

    firsts: Callable[[int], torch.Tensor]
    arranged: Callable[[torch.Tensor], torch.Tensor]
    swapped: Callable[[torch.Tensor, int], torch.Tensor]


def _first_half(rotated: int) -> torch.Tensor:
    return torch.arange(rotated) < rotated // 2


def _even(rotated: int) -> torch.Tensor:
    return torch.arange(rotated) % 2 == 0


def _as_it_is(heads: torch.Tensor) -> torch.Tensor:
    return heads


def _even_then_odd(heads: torch.Tensor) -> torch.Tensor:
    return heads.unflatten(-1, (-1, 2)).transpose(-1, -2)


def _other_half(heads: torch.Tensor, rotated: int) -> torch.Tensor:
    half = rotated // 2
    return torch.cat([heads[..., half:rotated], heads[..., :half], heads[..., rotated:]], dim=-1)


def _neighbour(heads: torch.Tensor, rotated: int) -> torch.Tensor:
    swapped = heads[..., :rotated].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return swapped if rotated == heads.shape[-1] else torch.cat([swapped, heads[..., rotated:]], dim=-1)


PAIRINGS = (
    Pairing(_first_half, _as_it_is, _other_half),
    Pairing(_even, _as_it_is, _neighbour),
    Pairing(_even, _even_then_odd, _other_half),
)


class Rotaries:
    """Has attention modules rotate this way; one for all modules of a device."""

    def __init__(self) -> None:
        self._known: dict[Function, Rotary] = {}

    def fuse(self, module: torch.nn.Module) -> bool:
        """Replace what the forward of *module* calls for it; whether it calls such a function."""
        functions = {} if "forward" in vars(module) else rotary_functions(module)
        if functions:
            call_instead(module, {name: self._of(own) for name, own in functions.items()})
        return bool(functions)

    def _of(self, own: Function) -> Rotary:
        if own not in self._known:
            self._known[own] = Rotary(own)
        return self._known[own]


class Rotary:
    """What is called in place of *own*, which takes one or two tensors of heads, cosines, sines, and numbers."""

    def __init__(self, own: Function) -> None:
        self._own = own
        self._num_heads = list(inspect.signature(own).parameters).index("cos")
        self._formulas: dict[tuple[Any, ...], Formula | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = self._num_heads
        heads, angles, rest = args[:count], args[count : count + 2], args[count + 2 :]
        if not _is_usual(heads, angles, (*rest, *kwargs.values())):
            return self._own(*args, **kwargs)
        kinds = *((tensor.shape[-1], tensor.dtype) for tensor in (*heads, *angles)), rest, *kwargs.items()
        if kinds not in self._formulas:
            self._formulas[kinds] = self._found(heads, angles, rest, kwargs)
        formula = self._formulas[kinds]
        if formula is None:
            return self._own(*args, **kwargs)
        known = current().rotations
        place = (formula, *((tensor.data_ptr(), tensor.shape, tensor.device) for tensor in angles))
        if place not in known:  # kept with the angles, so that nothing else gets their place
            known[place] = formula.factors(angles), angles
        rotated = formula.rotate(heads, known[place][0])
        return rotated[0] if count == 1 else tuple(rotated)

    def _found(
        self, heads: Sequence[torch.Tensor], angles: Sequence[torch.Tensor], rest: Any, kwargs: Any
    ) -> Formula | None:
        """The formula for such *heads* and *angles*, whatever is in them; ``None``: there is none."""
        bound = inspect.signature(self._own).bind(*heads, *angles, *rest, **kwargs)
        names = list(bound.signature.parameters)[: len(heads) + len(angles)]
        others = {name: value for name, value in bound.arguments.items() if name not in names}
        return find_formula(self._own, heads, angles, others)


def rotary_functions(module: torch.nn.Module) -> dict[str, FunctionType]:
    """The functions that the forward of *module* rotates heads by, by the names that it has for them."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or inspect.unwrap(forward) is not forward:
        return {}
    called = {name: forward.__globals__.get(name) for name in forward.__code__.co_names if name.startswith(PREFIX)}
    return {name: own for name, own in called.items() if _takes_angles(own)}


def find_formula(
    own: Function, heads: Sequence[torch.Tensor], angles: Sequence[torch.Tensor], others: Mapping[str, Any]
) -> Formula | None:
    """What *own* does to such *heads* with such *angles*, whatever is in them; ``None``: none of :data:`PAIRINGS`.

    Args:
        others: its further arguments.
    """
    axis = others.get("unsqueeze_dim", inspect.signature(own).parameters.get("unsqueeze_dim", _AXIS).default)
    if axis not in {1, 2}:
        return None

    def ask(heads: Sequence[torch.Tensor], angles: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if list(inspect.signature(own).parameters).index("cos") == 1:
            return [own(tensor, *angles, **others) for tensor in heads]
        return own(*heads, *angles, **others)

    with torch.inference_mode():
        probes = [
            _Probe.draw(ask, heads, angles, axis, *dtypes)
            for dtypes in ((torch.float32, torch.float32), (heads[0].dtype, angles[0].dtype))
        ]
        width = heads[0].shape[-1]
        keeps_dtype = probes[-1].expected[0].dtype == heads[0].dtype
        for pairing in PAIRINGS:
            for rotated in sorted({min(width, times * angles[0].shape[-1]) for times in (1, 2)}):
                formula = Formula(ask, pairing, width, rotated, axis, keeps_dtype=keeps_dtype)
                if rotated % 2 == 0 and all(probe.agrees(formula) for probe in probes):
                    return formula
    return None


class Formula:
    """What a function does.

    Args:
        ask: makes of heads and angles what the function does.
        width: of a head, of which the first *rotated* places are rotated as *pairing* says.
        heads_axis: counts heads.
        keeps_dtype: whether it returns heads in theirs; else in the one that they and the angles are promoted to.
    """

    def __init__(
        self, ask: Function, pairing: Pairing, width: int, rotated: int, heads_axis: int, *, keeps_dtype: bool
    ) -> None:
        self._ask = ask
        self._pairing = pairing
        self._rotated = rotated
        self._heads_axis = heads_axis
        self._keeps_dtype = keeps_dtype
        self._firsts = torch.ones(width, dtype=torch.bool)
        self._firsts[:rotated] = pairing.firsts(rotated)
        self._there: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def factors(self, angles: Sequence[torch.Tensor]) -> Factors:
        """``(1, rows, 1, width)``: of every value, and of its partner."""
        is_first, *one_hot = self._places(angles[0])
        shape = [1, angles[0].shape[1], angles[0].shape[1], len(is_first)]
        shape[self._heads_axis] = 1
        asked = self._ask([places.expand(shape) for places in one_hot], angles)
        of_firsts, of_seconds = (self._by_row(found) for found in asked)
        return torch.where(is_first, of_firsts, of_seconds), torch.where(is_first, of_seconds, of_firsts)

    def _places(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Whether a place is the first of its pair, as heads are returned; one at all those, and at all others."""
        key = like.device, like.dtype
        if key not in self._there:
            is_first = self._pairing.arranged(self._firsts).flatten()
            parts = is_first, self._firsts.to(like.dtype), (~self._firsts).to(like.dtype)
            self._there[key] = tuple(part.to(like.device) for part in parts)
        return self._there[key]

    def swapped(self, rotated: torch.Tensor) -> torch.Tensor:
        """*rotated* heads ``(…, width)``, as the function returns them, with every value at its partner's place."""
        return self._pairing.swapped(rotated, self._rotated)

    def rotate(self, heads: Sequence[torch.Tensor], factors: Factors) -> list[torch.Tensor]:
        """*heads*, as the function returns them."""
        direct, of_partner = factors
        arranged = [self._pairing.arranged(self._by_row(tensor)) for tensor in heads]
        together = torch.cat(arranged, dim=2) if len(arranged) > 1 else arranged[0]
        together = together.flatten(3)
        swapped = self._pairing.swapped(together, self._rotated)
        found = torch.addcmul(together * direct, swapped, of_partner)
        if self._keeps_dtype:
            found = found.to(together.dtype)
        return [self._by_row(part) for part in found.split([tensor.shape[self._heads_axis] for tensor in heads], dim=2)]

    def _by_row(self, heads: torch.Tensor) -> torch.Tensor:
        """``(1, rows, heads, width)`` out of what the function takes, and back."""
        return heads if self._heads_axis == 2 else heads.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random heads and angles, and what a function makes of them."""

    heads: Sequence[torch.Tensor]
    angles: Sequence[torch.Tensor]
    expected: Sequence[torch.Tensor]

    @classmethod
    def draw(
        cls,
        ask: Function,
        heads: Sequence[torch.Tensor],
        angles: Sequence[torch.Tensor],
        heads_axis: int,
        dtype: torch.dtype,
        angles_dtype: torch.dtype,
    ) -> _Probe:
        """With the widths of *heads* and *angles*."""
        generator = torch.Generator().manual_seed(0)
        drawn = []
        for tensor in heads:
            shape = [1, _PROBED_ROWS, _PROBED_ROWS, tensor.shape[-1]]
            shape[heads_axis] = tensor.shape[heads_axis]
            drawn.append(torch.randn(shape, generator=generator).to(dtype))
        shapes = [(1, _PROBED_ROWS, tensor.shape[-1]) for tensor in angles]
        turns = [torch.randn(shape, generator=generator).to(angles_dtype) for shape in shapes]
        return cls(drawn, turns, ask(drawn, turns))

    def agrees(self, formula: Formula) -> bool:
        """Whether *formula* makes the same of them."""
        found = formula.rotate(self.heads, formula.factors(self.angles))
        return all(self._are_alike(ours, own) for ours, own in zip(found, self.expected, strict=True))

    def _are_alike(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        dtype = self.heads[0].dtype
        tolerance = _FP32_TOLERANCE if dtype == torch.float32 else _ROUNDINGS * torch.finfo(dtype).eps
        return found.shape == expected.shape and bool(
            (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
        )


def _takes_angles(function: Any) -> TypeGuard[Function]:
    """Whether it takes heads, then cosines and sines."""
    if not isinstance(function, FunctionType):
        return False
    names = list(inspect.signature(function).parameters)
    return "cos" in names and names.index("cos") in {1, 2} and names[names.index("cos") + 1 :][:1] == ["sin"]


def _is_usual(heads: Sequence[Any], angles: Sequence[Any], rest: Sequence[Any]) -> bool:
    """Whether all of it came in its place: heads of one sequence, angles of its rows, and otherwise numbers."""
    are_tensors = len(angles) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in (*heads, *angles))
    if not are_tensors or not all(value is None or isinstance(value, int) for value in rest):
        return False
    return all(tensor.dim() == 4 for tensor in heads) and all(tensor.dim() == 3 for tensor in angles)
