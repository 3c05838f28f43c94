"""What a prompt may be read for, instead of being answered: :class:`TokenLogits`, :class:`HiddenState`.

A prompt that is read takes part in sweeps like any other, until its last token is computed. What is wanted of its rows
belongs to its sequence; sweeps deliver it, and no token is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from layerstream.api import arguments

Pooling: TypeAlias = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class TokenLogits:
    """The logits of *token_ids* after the last token of the prompt, in that order.

    Raises:
        ConfigurationError: no token ids.
    """

    token_ids: Sequence[int]

    def __post_init__(self) -> None:
        given: object = self.token_ids
        if not isinstance(given, list | tuple) or not given:
            raise arguments.refusal("token_ids", given, "a list of token ids, one at least")
        checked = tuple(arguments.whole_number("token_ids", item, 0) for item in self.token_ids)
        object.__setattr__(self, "token_ids", checked)


@dataclass(frozen=True, slots=True)
class HiddenState:
    """What comes out of the final norm: of the prompt's last token, or the mean over all of its tokens.

    A mean needs the rows of all tokens, so KV that is there already saves nothing, and none is left to others.

    Raises:
        ConfigurationError: another *pooling*.
    """

    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        arguments.one_of("pooling", self.pooling, get_args(Pooling))


Reading: TypeAlias = TokenLogits | HiddenState
