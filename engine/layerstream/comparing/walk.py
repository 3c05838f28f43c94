"""Plain transformers' run beside what the engine recorded: each layer twice, while its weights are there.

Once on what the layers below it made of the prompt: that is plain transformers, and its logits say which token is
right. And once on what the engine's layer was given: that alone says whether this layer is computed right, since no
difference of the layers below is in it. Where a layer sends rows to experts it is given what the engine's mixture was
given, too, and the engine's choice of experts, which is compared by itself: a row between two experts that are as good
as equal would else differ as much as one that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from layerstream.comparing.differences import Difference, difference, drift, rerouted
from layerstream.comparing.judging import Finding, Tolerance
from layerstream.comparing.plain import PlainModel
from layerstream.comparing.recording import Record, Taps, by_rows, gave, given
from layerstream.comparing.stations import Mixture, Stations
from layerstream.errors import UnsupportedModel

OnLayer: TypeAlias = Callable[[int, int], None]
"""Told how many of how many modules have been compared."""


class Walk:
    """One run of plain transformers over *num_tokens* tokens.

    Args:
        record: what the engine's modules were given.
        inside: where to file what the modules within the first layer that differs are given and give.

    Attributes:
        findings: of embedding and chain, in order.
        returned: the modules within the first layer that differs, in the order in which they returned.
    """

    def __init__(
        self, plain: PlainModel, stations: Stations, record: Record, inside: Record, tolerance: Tolerance
    ) -> None:
        self._plain = plain
        self._stations = stations
        self._record = record
        self._inside = inside
        self._tolerance = tolerance
        self._is_aside = False
        self._of_mixture: list[torch.Tensor] = []
        self._num_ties = self._num_misrouted = 0
        self._num_tokens = 0
        self.findings: list[Finding] = []
        self.returned: list[str] = []

    def run(self, token_ids: list[int], num_logits: int, on_layer: OnLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``(num_logits, vocabulary)`` of the last rows: of plain transformers' own run, and of its head on what
        the engine's head was given."""
        self._num_tokens = len(token_ids)
        chain = self._stations.chain

        def watch(path: str, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._compare(path, module, args, kwargs, output)
            on_layer(1 + chain.index(path), len(chain))

        def beside(hidden: torch.Tensor) -> torch.Tensor:
            recorded = self._recorded(f"{chain[-1]}:out")
            return torch.cat([hidden, recorded[None].to(hidden.dtype)])

        with self._handing_over():
            logits = self._plain.run(token_ids, chain, watch, beside, num_logits)
        return logits[0], logits[1]

    def _compare(self, path: str, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entering, found = self._recorded(f"{path}:in"), self._recorded(self._stations.after(path))
        if path == self._stations.chain[0]:
            self._add(self._stations.embedding, difference(entering, self._rows(given(args, kwargs)), self._tolerance))
        self._of_mixture.clear()
        self._num_ties = self._num_misrouted = 0
        expected = self._aside(module, args, kwargs, entering)
        is_layer = path in self._stations.layers
        apart = difference(found, expected, self._tolerance, entering if is_layer else None)
        for excess in self._of_mixture:
            apart = Difference(torch.maximum(apart.excess, excess), apart.apart)
        is_first = all(finding.agrees for finding in self.findings)
        self._add(path, apart, drift(found, self._rows(*gave(output)[:1])))
        if is_first and is_layer and not apart.agrees:
            self._look_inside(path, module, args, kwargs, entering)

    def _add(self, path: str, apart: Difference, drifted: float = 0.0) -> None:
        row = apart.worst_row
        routed = self._num_ties, self._num_misrouted
        self.findings.append(Finding(path, apart.worst, float(apart.apart[row]), row, drifted, *routed))

    def _look_inside(self, path: str, module: torch.nn.Module, args: Any, kwargs: Any, entering: torch.Tensor) -> None:
        rows = [(0, 0, self._num_tokens)]
        model = self._plain.model
        with Taps(model, self._inside, lambda: (self._num_tokens, rows)).open() as taps:
            for inner in self._stations.within(path, [name for name, _ in model.named_modules()]):
                taps.on_input(inner)
                taps.on_output(inner)
            output = self._aside(module, args, kwargs, entering)
        self._inside.put(f"{path}:out", [output], self._num_tokens, rows)
        self.returned = [*taps.returned, path]

    def _aside(self, module: torch.nn.Module, args: Any, kwargs: Any, entering: torch.Tensor) -> torch.Tensor:
        """What *module* makes of the rows *entering*."""
        self._is_aside = True
        try:
            args, kwargs = _substitute(args, kwargs, entering)
            return self._rows(*gave(module.forward(*args, **kwargs))[:1])
        finally:
            self._is_aside = False

    @contextmanager
    def _handing_over(self) -> Iterator[None]:
        """Within it, mixtures compute on what the engine's computed on, while a layer does."""
        handles = []
        for mixture in self._stations.mixtures:
            for path, hook in ((mixture.path, self._hand_over), (mixture.experts, self._route)):
                module = self._plain.model.get_submodule(path)

                def run(_: Any, args: Any, kwargs: Any, hook: Any = hook, mixture: Mixture = mixture) -> Any:
                    return hook(mixture, args, kwargs) if self._is_aside else None

                handles.append(module.register_forward_pre_hook(run, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hand_over(self, mixture: Mixture, args: Any, kwargs: Any) -> Any:
        found = self._recorded(f"{mixture.path}:in")
        apart = difference(found, self._rows(given(args, kwargs)), self._tolerance)
        self._of_mixture.append(apart.excess)
        return _substitute(args, kwargs, found)

    def _route(self, mixture: Mixture, args: Any, kwargs: Any) -> Any:
        found = self._record.get(f"{mixture.experts}:experts"), self._record.get(f"{mixture.experts}:weights")
        if found[0] is None or found[1] is None:  # computed by another way than this module
            return None
        hidden, index, weights = (*args, *kwargs.values())[:3]
        ties, wrong = rerouted((found[0], found[1]), (index, weights), self._tolerance)
        self._num_ties, self._num_misrouted = int(ties.sum()), int(wrong.sum())
        self._of_mixture.append(torch.where(wrong, torch.inf, 0.0))
        return (hidden, found[0].to(index.dtype), found[1].to(weights.dtype)), {}

    def _recorded(self, name: str) -> torch.Tensor:
        found = self._record.get(name)
        if found is None:
            raise UnsupportedModel(
                f"this model cannot be compared: {name.partition(':')[0]!r} was not called once for every token here"
            )
        return found

    def _rows(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        found = None if tensor is None else by_rows(tensor, self._num_tokens)
        if found is None:
            raise UnsupportedModel("this model cannot be compared: one of its layers has no row for each token")
        return found


def _substitute(args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments with *rows* in the place of the first tensor of numbers."""
    own = given(args, kwargs)
    assert own is not None
    value = rows.to(own.dtype).view(own.shape)
    replaced = tuple(value if one is own else one for one in args)
    return replaced, {name: value if one is own else one for name, one in kwargs.items()}
