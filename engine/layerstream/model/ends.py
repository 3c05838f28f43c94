"""What a causal model does before its decoder and after it, done by its own code.

Decoder and head are short-circuited: the runner computes both itself. So the causal model's ``forward`` is called with
hidden states and logits that are there already, and what it does to them (scaling, soft caps) is done by it. What that
is, probes on random numbers find out when the model is built: often it is nothing, and else mostly a function of
single values, which a device computes of all rows at once. On the processor rows go through one by one, in one shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from layerstream.model.anatomy import Anatomy

_PROBED_ROWS = 3
_SPREAD = 8.0  # of probed numbers: soft caps show


class ModelEnds:
    """The ends of the model of *anatomy*, which computes in *dtype*. One call at a time.

    Attributes:
        leads: whether it does anything to final hidden states before its head.
        finishes: whether it does anything to logits.
    """

    def __init__(self, anatomy: Anatomy, dtype: torch.dtype) -> None:
        self._anatomy = anatomy
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._given = torch.empty(0)  # to the head
        for part in (anatomy.trunk, anatomy.decoder):  # some call the one, some the other
            part.forward = self._decoded
        anatomy.head.forward = self._projected  # type: ignore[method-assign,assignment]
        generator = torch.Generator().manual_seed(0)
        hidden, logits = (
            (torch.randn((_PROBED_ROWS, width), generator=generator) * _SPREAD).to(dtype)
            for width in (anatomy.head.in_features, anatomy.head.out_features)
        )
        led, finished = self._lead_one_by_one(hidden), self._finish_one_by_one(hidden, logits.clone())
        self.leads, self.finishes = not _is(led, hidden), not _is(finished, logits)
        self._leads_at_once = _is_nearly(self._lead(hidden), led)
        self._finishes_at_once = _is_nearly(self._finish(hidden, logits), finished)

    def embed(self, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The embedding module's own forward over gathered *rows*: ``(n, hidden)``, scaled where the family does."""
        with _bound(self._anatomy.embedding, rows):
            return self._anatomy.embedding(indices)

    def embed_layers(self, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The decoder's own look-up in gathered *rows* of its second table: ``(n, layers, width)``."""
        assert self._anatomy.layer_embedding is not None
        with _bound(self._anatomy.layer_embedding, rows):
            return self._anatomy.decoder.get_per_layer_inputs(indices)

    def lead(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, hidden)``: what the causal model makes of final hidden states before its head: scales them, if that."""
        if not self.leads:
            return hidden
        return self._lead_one_by_one(hidden) if hidden.is_cpu or not self._leads_at_once else self._lead(hidden)

    def finish(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``(n, vocabulary)``: what the causal model makes of raw *logits*, with final hidden states beside them; into
        their memory where it can."""
        if not self.finishes:
            return logits
        if not hidden.is_cpu and self._finishes_at_once:
            return self._finish(hidden, logits)
        return self._finish_one_by_one(hidden, logits)

    def _lead_one_by_one(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._lead(row) for row in hidden.split(1)])

    def _lead(self, hidden: torch.Tensor) -> torch.Tensor:
        self._finish(hidden, hidden.new_zeros(()).expand(len(hidden), self._anatomy.head.out_features))
        return self._given

    def _finish_one_by_one(self, hidden: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        logits = raw
        for row in range(len(hidden)):
            finished = self._finish(hidden[row : row + 1], raw[row : row + 1])
            if finished.dtype != logits.dtype:  # some models finish in fp32
                logits = torch.empty_like(raw, dtype=finished.dtype)
            logits[row] = finished[0]
        return logits

    def _finish(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``(n, vocabulary)``, of as many rows at once."""
        self._hidden, self._logits = hidden[None], logits[None]
        try:
            return self._anatomy.causal(inputs_embeds=self._hidden, use_cache=False).logits[0]
        finally:
            self._hidden = self._logits = None

    def _decoded(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=self._hidden)

    def _projected(self, hidden: torch.Tensor) -> torch.Tensor | None:
        self._given = hidden.view(-1, hidden.shape[-1])
        return self._logits


class _Output(MoeModelOutputWithPast):
    """What a model below the head gives; ``None`` for what only some models give beside hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return


def _is(found: torch.Tensor, given: torch.Tensor) -> bool:
    return found.dtype == given.dtype and torch.equal(found, given)


def _is_nearly(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are alike, but for what the processor's vectors make of single values."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=torch.finfo(found.dtype).eps, atol=torch.finfo(found.dtype).eps)


@contextmanager
def _bound(embedding: torch.nn.Embedding, rows: torch.Tensor) -> Iterator[None]:
    """*embedding* has *rows* alone."""
    meta = embedding._parameters["weight"]
    embedding._parameters["weight"] = rows  # type: ignore[assignment]
    try:
        yield
    finally:
        embedding._parameters["weight"] = meta
