"""Where keys stand, and how they are moved: what rotary positions do to a layer's keys, found out and undone.

Keys are cached after they were rotated to their positions. To stand *d* positions further on they are rotated by *d*
once more: rotations add up. Which function rotates them, and by which angles, is noted while the decoder runs without
weights (:class:`RotaryNotes`, :mod:`layerstream.model.trace`): angles come out of modules of rotary positions, the
function is given them, and what it returns is what the cache is given. A layer whose keys no such function saw leaves
them where they are: it has no positions (or a bias that follows from the distance).

What that misses (positions that are added to embeddings, angles that depend on the longest position) is for
:func:`layerstream.setup.movable.check_movable` to find: it moves the keys of a small copy of the model.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from layerstream.model.hooks import call_instead
from layerstream.model.rotary import Formula, find_formula, rotary_functions

MOST_DISTANCES = 64
"""Whose factors are kept: those of a few prompts."""
MODULES = ("RotaryEmbedding", "RotaryPositionalEmbedding")
"""How the modules that give angles end, everywhere in transformers."""


@dataclass(frozen=True, slots=True)
class Turn:
    """How the keys of a layer are rotated.

    Attributes:
        angles: path of the module that gives the angles.
        more: what that is given beside hidden states and positions.
        formula: what the function does to a head.
        width: of the places of a head that the function sees, the first ones.
        is_of_values: whether what it rotates is cached as values: of latents, the part that has positions.
    """

    angles: str
    more: tuple[tuple[str, Any], ...]
    formula: Formula
    width: int
    is_of_values: bool = False


@dataclass(slots=True)
class _Call:
    formula: Formula | None
    source: tuple[str, tuple[tuple[str, Any], ...]] | None
    results: Sequence[torch.Tensor]


@dataclass(slots=True)
class RotaryNotes:
    """What was seen of a run: which angles came from where, and what was rotated by them since the last key."""

    _angles: dict[int, tuple[str, tuple[tuple[str, Any], ...], Any]] = field(default_factory=dict[int, Any])
    _calls: list[_Call] = field(default_factory=list[_Call])
    _formulas: dict[tuple[Any, ...], Formula | None] = field(default_factory=dict[tuple[Any, ...], Any])

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Turn | None, bool]:
        """How *keys* ``(1, heads, rows, width)``, which are about to be cached beside *values*, were rotated; whether
        that is known.

        ``(None, True)``: no function saw them.
        """
        calls, self._calls = self._calls, []
        if not calls:
            return None, True
        is_of_values = any(values is result for call in calls for result in call.results)
        kept = values if is_of_values else keys
        call = next((call for call in calls if any(kept is result for result in call.results)), calls[-1])
        if call.formula is None or call.source is None:
            return None, False
        width = call.results[-1].shape[-1]
        if width > kept.shape[-1]:
            return None, False
        return Turn(*call.source, call.formula, width, is_of_values), True

    @contextmanager
    def watching(self, decoder: torch.nn.Module, paths: Mapping[torch.nn.Module, str]) -> Iterator[None]:
        """While it lasts, modules of *decoder* say what angles they give and what they rotate by them."""
        changed: list[torch.nn.Module] = []
        try:
            for module in decoder.modules():
                if "forward" in vars(module):
                    continue
                if type(module).__name__.endswith(MODULES):
                    module.forward = self._giving(module, paths[module])
                    changed.append(module)
                elif functions := rotary_functions(module):
                    call_instead(module, {name: self._rotating(own) for name, own in functions.items()})
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward

    def _giving(self, module: torch.nn.Module, path: str) -> Callable[..., Any]:
        forward = type(module).forward
        names = list(inspect.signature(forward).parameters)

        def give(*args: Any, **kwargs: Any) -> Any:
            angles = forward(module, *args, **kwargs)
            given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
            more = tuple((name, value) for name, value in given.items() if name not in {"x", "position_ids"})
            if isinstance(angles, tuple) and all(not isinstance(value, torch.Tensor) for _, value in more):
                self._angles[id(angles[0])] = path, more, angles  # kept, so that its id stays its own
            return angles

        return give

    def _rotating(self, own: FunctionType) -> Callable[..., Any]:
        parameters = list(inspect.signature(own).parameters)
        at = parameters.index("cos")

        def rotate(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            bound = inspect.signature(own).bind(*args, **kwargs).arguments
            heads, cosines = [bound[name] for name in parameters[:at]], bound["cos"]
            known = self._angles.get(id(cosines))
            results = found if isinstance(found, tuple) else (found,)
            formula = None
            if known is not None:
                rest = {name: value for name, value in bound.items() if name not in {*parameters[: at + 2]}}
                formula = self._formula(own, heads, [cosines, bound["sin"]], rest)
            self._calls.append(_Call(formula, None if known is None else known[:2], results))
            return found

        return rotate

    def _formula(
        self, own: FunctionType, heads: Sequence[torch.Tensor], angles: Sequence[torch.Tensor], others: dict[str, Any]
    ) -> Formula | None:
        """What *own* does to such heads, found once: layers that rotate alike have one formula."""
        kinds = own, *((tensor.shape[-1], tensor.dtype) for tensor in (*heads, *angles)), repr(others)
        if kinds not in self._formulas:
            self._formulas[kinds] = find_formula(own, heads, angles, others)
        return self._formulas[kinds]


class Turner:
    """Moves what layers that rotate alike have cached.

    Args:
        module: that gives the angles.
    """

    def __init__(self, turn: Turn, module: torch.nn.Module) -> None:
        self._turn = turn
        self._module = module
        self._factors: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def moved(self, keys: torch.Tensor, values: torch.Tensor, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
        """*keys* and *values* ``(…, rows, width)`` as they are cached *distance* positions further on (negative:
        further ahead).

        Computed in fp32, returned in their dtype.
        """
        if not distance:
            return keys, values
        if self._turn.is_of_values:
            return keys, self._turned(values, distance)
        return self._turned(keys, distance), values

    def _turned(self, heads: torch.Tensor, distance: int) -> torch.Tensor:
        direct, of_partner = self._at(distance)
        width = self._turn.width
        seen = heads[..., :width].float()
        found = torch.addcmul(seen * direct, self._turn.formula.swapped(seen), of_partner).to(heads.dtype)
        return found if width == heads.shape[-1] else torch.cat([found, heads[..., width:]], dim=-1)

    def _at(self, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(width,)``: what values are multiplied by, and their partners."""
        if distance not in self._factors:
            while len(self._factors) >= MOST_DISTANCES:
                self._factors.popitem(last=False)
            positions = torch.tensor([[0, abs(distance)]])
            like = torch.zeros((1, 2, 1), dtype=torch.float32)
            forward = type(self._module).forward  # the module's own: it is given no rows of a sweep
            angles = forward(self._module, like, position_ids=positions, **dict(self._turn.more))
            direct, of_partner = (part.reshape(2, -1).float() for part in self._turn.formula.factors(angles))
            scale = direct[0]  # at position 0: what else the function multiplies by
            sign = 1 if distance > 0 else -1
            self._factors[distance] = direct[1] / scale, sign * of_partner[1] / scale
        return self._factors[distance]
