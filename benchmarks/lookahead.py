"""Whether it pays to read the experts that the next layer is likely to want, before it says so.

    python -m benchmarks.grow Qwen3-30B-A3B MODEL --quantization int4 --skew 1.0
    python -m benchmarks.lookahead MODEL [--memory 6GiB] [--right 1.0 0.8 0.6] [--json FILE]

The next layer's router is asked about this layer's input, as others do it, and what it names is read at low priority
while this layer computes. In a grown model the added layers change nothing, so that the router is right about all of
it; with ``--right 0.8`` one in five of its experts is replaced by a random one, which is what is reported of real
models. One engine answers the same questions with and without looking ahead, in turns; what is shown are medians over
sweeps of one row, and the ratio of the sums. The engine does not look ahead: this is where it was decided.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layerstream.model import block_experts as routed
from layerstream.model import experts as computing
from layerstream.streaming.experts.bank import ExpertBank

from benchmarks import bench
from benchmarks.experts import FACTS, MAX_TOKENS, Watch, _ask
from benchmarks.large import draw_questions

LOW = 1  # priority, after what is waited for
QUESTIONS = 4
TURNS = 2


class ForeseeingBank(ExpertBank):
    """Also reads what :attr:`foreseen` names, as long as nobody wants anything else."""

    right = 1.0  # of what is named, that share is left as it is
    is_on = False
    routers: Sequence[torch.Tensor] = ()
    hidden: torch.Tensor | None = None

    def want(self, experts: Sequence[int], shares: Sequence[float]) -> None:
        """What was foreseen in vain is let go of, then what comes next is foreseen."""
        with self._changed:
            for expert in self._foreseen() - set(experts):
                self._drop_foreseen(expert)
            self._foreseen().clear()
            super().want(experts, shares)
            if self.is_on and self.hidden is not None and len(self.hidden) == 1:
                for expert in self._name(experts[0] // self.routers[0].shape[0] + 1):
                    self._foresee(expert)

    def _foreseen(self) -> set[int]:
        return self.__dict__.setdefault("_foreseen_now", set())

    def _drop_foreseen(self, expert: int) -> None:
        """It was not wanted: it stays as long as it is worth its slot."""
        while expert in self._reading:
            self._changed.wait()
        if self.cache.is_there(expert):
            self._held.discard(expert)
            self.cache.let_go(expert)

    def _name(self, layer: int) -> list[int]:
        if layer >= len(self.routers):
            return []
        router, hidden = self.routers[layer], self.hidden
        assert hidden is not None
        top = torch.topk(hidden @ router.T, 8).indices[0]
        kept = torch.rand(len(top)) < self.right
        named = torch.where(kept, top, torch.randint(len(router), (len(top),)))
        return [layer * len(router) + int(expert) for expert in named.unique()]

    def _foresee(self, expert: int) -> None:
        if self.cache.is_there(expert) or (slot := self.cache.place(expert)) is None:
            return
        layout = self._layout(expert)
        self._foreseen().add(expert)
        self._held.add(expert)
        self._reading[expert] = len(layout.requests)
        self.streamed_bytes += layout.weight_bytes
        for request in layout.requests:
            done = partial(self._finish, expert)
            self._reader.submit(request, self.arena.view, slot * self._slot_bytes, done, priority=LOW)

    def _pump(self) -> None:
        """What was foreseen holds nothing up."""
        ahead, self._ahead = self._ahead, self._ahead + len(self._foreseen())
        try:
            super()._pump()
        finally:
            self._ahead = ahead


def main() -> None:
    """Ask in turns, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--right", nargs="+", type=float, default=[1.0, 0.8, 0.6])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    rows = []
    for right, turns in found.items():
        on, off = turns["on"], turns["off"]
        rows.append(
            [
                right,
                f"{statistics.median(off['seconds']):.3f}",
                f"{statistics.median(on['seconds']):.3f}",
                f"{sum(on['seconds']) / sum(off['seconds']):.2f}",
                f"{statistics.mean(off['waited']):.3f}",
                f"{statistics.mean(on['waited']):.3f}",
                f"{statistics.mean(off['bytes']) / 1e6:.0f}",
                f"{statistics.mean(on['bytes']) / 1e6:.0f}",
            ]
        )
    heads = ["foreseen right", "s/sweep off", "on", "on/off", "waited off", "on", "read MB off", "on"]
    bench.show(f"{options.model.name} in {options.memory}, one row", heads, rows)
    print("written to", bench.save("lookahead", {"model": options.model.name, "turns": found}, options.json))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """For each share of right guesses: seconds, waits and bytes of sweeps of one row, with and without."""
    from layerstream import LayerStream
    from transformers import AutoTokenizer

    routed.ExpertBank = ForeseeingBank  # type: ignore[misc]
    add_up = computing._sum

    def noted(module: Any, call: Any, *rest: Any) -> torch.Tensor:
        ForeseeingBank.hidden = call.hidden
        return add_up(module, call, *rest)

    computing._sum = noted
    asked = draw_questions(AutoTokenizer.from_pretrained(options.model), FACTS, QUESTIONS)
    watch, found = Watch(), {}
    with LayerStream(
        options.model, device="cpu", memory=options.memory, kv_store=None, speculation="off", progress=watch
    ) as engine:
        watch.bank = bank = engine._parts.weights.banks[0]
        assert isinstance(bank, ForeseeingBank)
        layers = engine._parts.weights._parts[0]._skeleton.decoder.layers
        assert engine.plan.weights.num_streamed == 0, "routers come and go: give it more memory"
        ForeseeingBank.routers = [layer.mlp.gate.weight for layer in layers]
        for group in asked:
            _ask(engine, [group], 4)
        for right in options.right:
            turns: dict[str, dict[str, list[float]]] = {
                way: {"seconds": [], "waited": [], "bytes": []} for way in ("off", "on")
            }
            for turn in range(TURNS * len(asked)):
                for way in ("off", "on") if turn % 2 else ("on", "off"):
                    ForeseeingBank.is_on, ForeseeingBank.right = way == "on", right
                    watch.sweeps.clear()
                    _ask(engine, [asked[turn % len(asked)]], MAX_TOKENS)
                    for sweep in watch.sweeps:
                        if sweep["rows"] == 1:
                            turns[way]["seconds"].append(sweep["seconds"])
                            turns[way]["waited"].append(sweep["waited"])
                            turns[way]["bytes"].append(sweep["expert_bytes"])
            found[f"{right:.0%}"] = turns
            print(f"{right:.0%} …", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
