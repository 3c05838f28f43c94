"""A ``past_key_values`` for transformers' modules that appends to pages instead of growing tensors."""

from __future__ import annotations

from typing import Any

import torch

from layerstream.errors import UnsupportedModel
from layerstream.kv.state import PagedRows
from layerstream.model.context import SweepContext, current


class PagedCache:
    """Quacks like transformers' ``Cache`` as far as attention modules and mask helpers look.

    ``update`` appends the new rows of every span in hand to its sequence's pages, guesses beside them. It returns its
    arguments, and the attention function reads the pages itself; in layers that expand what they cached (latents), it
    returns past and new rows of the one sequence in hand.
    """

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()  # transformers then asks for the sizes of layer 0; our masks are our own

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``(1, heads, rows, width)`` keys and values of the rows in hand."""
        context = current()
        layer = context.layers[layer_idx]
        state = context.state(layer.state)
        if context.pools is not None:
            context.pools.write(layer.state, context.active, key_states[0], value_states[0])
        else:
            _write(context, layer.state, state, key_states[0], value_states[0])
        if not layer.expands:
            return key_states, value_states
        span = self._only_span("expands cached latents")
        if context.pools is not None:  # what the guess hangs on is in place then
            list(context.pools.waves(layer.state, context.active[0][1]))
        keys, values = state.read(span.sequence.pages, 0, context.attended(span)[1])
        if span.is_drafted and context.pools is None:
            context.drafted.place(layer.state, span, keys, values, 0, ())
        return keys[None], values[None]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: a mixer's scans find the states themselves (:mod:`layerstream.model.recurrence`)."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """As :meth:`get_conv_state`."""

    def update_conv_state(self, conv_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What a convolution goes over: the rows in hand."""
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """The scan has left it where it belongs."""
        return recurrent_states

    def is_recording_past(self, *_: Any) -> bool:
        """No: guesses are taken back otherwise."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the rows in hand; 0 where they belong to several sequences (positions are passed along)."""
        spans = [span for _, span in current().spans()]
        return spans[0].start if len(spans) == 1 else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As :meth:`get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Sizes for a mask that is never built."""
        return query_length, 0

    def _only_span(self, what: str) -> Any:
        spans = [span for _, span in current().spans()]
        if len(spans) != 1:
            raise UnsupportedModel(
                f"a model that {what} runs one sequence per row block, and {len(spans)} are in hand: its attention "
                "does not fit the ring as a whole; give it a larger memory budget"
            )
        return spans[0]


def _write(context: SweepContext, number: int, state: PagedRows, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Append ``(heads, rows, width)`` of the rows in hand to their pages, guesses beside them.

    What a prompt's last chunk lacks is attended to as zeros: it is masked, and has to be numbers.
    """
    for row, span in context.spans():
        if context.blend is not None:
            context.blend.arrive(number, state, span, keys[:, row : row + len(span)])
        if span.is_drafted:
            context.drafted.put(number, span, keys[:, row], values[:, row])
            continue
        rows = slice(row, row + len(span))
        state.append(span.sequence.pages, span.start, keys[:, rows], values[:, rows])
        if (stop := context.attended(span)[1]) > span.stop and not context.is_moving(number, span.sequence):
            state.clear(span.sequence.pages, span.stop, stop)
