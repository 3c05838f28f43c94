"""Masks that transformers asks for, known again where they arrive, and what they let through.

The registered mask function gives a tensor that holds nothing and knows how it was asked for. It comes to attention as
it is or cut, and is still known. Its window or chunk is compared with what it lets through, position by position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from layerstream.errors import UnsupportedModel
from layerstream.model.meta import flat

Locality: TypeAlias = tuple[int | None, int | None]
"""Window and chunk of a layer, each ``None`` where it has none."""


_FAR = tuple(2**power for power in range(10, 18))
_SAME = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__getitem__", "contiguous", "expand", "to", "unsqueeze", "squeeze", "view")
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A mask: whether a row sees a column, ``sees(batch, head, row, column)``; the width of its window or chunk."""

    sees: Callable[..., Any]
    size: int | None


class Mask(torch.Tensor):
    """A mask that was asked for; what is cut out of it is still that mask, what is computed with it is not."""

    asked: Asked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Mask) and func in _SAME:
            result.asked = next(item.asked for item in flat(args) if isinstance(item, Mask))
        return result


def note_mask(*_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any) -> torch.Tensor:
    """Stands for a mask that transformers asks its mask functions for; :func:`locality` says what it lets through."""
    mask = torch.empty((1, 1, 1, 1), dtype=torch.bool, device="meta").as_subclass(Mask)
    mask.asked = Asked(mask_function, local_size)
    return mask


def locality(family: str, asked: Asked) -> Locality:
    """Window and chunk of a mask.

    Raises:
        UnsupportedModel: it lets other positions through, or none.
    """
    if asked.size is not None and asked.size < 1:
        raise UnsupportedModel(
            f"{family!r} says that a row sees {asked.size} positions; expected 1 at the least: correct the window in "
            "its config.json"
        )
    for window, chunk in ((None, None),) if asked.size is None else ((asked.size, None), (None, asked.size)):
        if _lets_through(asked, window, chunk):
            return window, chunk
    raise UnsupportedModel(
        f"{family!r} lets its rows see other positions than those before them, of a window or of a chunk: it is not "
        "causal, and this version runs causal models"
    )


def _lets_through(asked: Asked, window: int | None, chunk: int | None) -> bool:
    """Whether *asked* shows just the positions of *window* or *chunk*, where either could differ."""
    size = asked.size or 7
    edges = (0, size, 2 * size, 3 * size, *_FAR)
    near = [at + step for at in edges for step in (-1, 0, 1) if at + step >= 0]
    rows, columns = torch.tensor(near)[:, None], torch.tensor(near)[None]
    expected = columns <= rows
    if window is not None:
        expected = expected & (columns > rows - window)
    if chunk is not None:
        expected = expected & (columns // chunk == rows // chunk)
    return torch.equal(asked.sees(0, 0, rows, columns).expand(expected.shape), expected)
