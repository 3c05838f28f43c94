"""The stages of :mod:`benchmarks.on_a_card`: each a function that prints what it finds, a line of JSON each time.

    python -m benchmarks.card.stages STAGE --work MODELS --out OUT [--tiny]

A sweep's time is that of so many more tokens, everything else being the same. Its limit is what streams, at the rate
that the link has in the same process: the better of before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layerstream import LayerStream, SamplingParams
from layerstream.hardware.accelerators import device_name, open_device
from layerstream.measuring import rates
from layerstream.model import grouped_experts
from layerstream.model.ragged_kernels import choose
from layerstream.setup.device_rows import device_rows
from transformers import AutoTokenizer

from benchmarks.card import peers
from benchmarks.card.shapes import CARD, TINY, Setting
from benchmarks.large import draw_questions

DEVICE = torch.device("cuda", 0)
RESIDENT = "40GiB"
QUESTIONS = 8
FACTS = 4  # in a context
PROMPT = 16  # tokens of what decodes
GRAPHS: tuple[dict[str, Any], ...] = ({}, {"cuda_graphs": False})
HEADS = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 64), (torch.float32, 128))


@dataclass(frozen=True)
class Bench:
    """What a stage has: its name, the *setting*, where models are, where files go."""

    stage: str
    setting: Setting
    work: Path
    out: Path
    links: list[float] = field(default_factory=list)

    def say(self, what: str, **found: Any) -> None:
        """A line about *what*."""
        print(json.dumps({"stage": self.stage, "what": what, **found}), flush=True)

    def model(self, name: str) -> Path:
        """The folder of the model that stages call *name*."""
        return self.work / name

    @contextlib.contextmanager
    def engine(self, name: str, memory: str | None = None, **options: Any) -> Iterator[LayerStream]:
        """On the device, without guesses and without a store."""
        options = {"kv_store": None, "speculation": "off", **options}
        memory = memory or self.setting.memory[name]
        with LayerStream(
            self.model(name), device="cuda", memory=memory, host_memory=self.setting.host_memory, **options
        ) as engine:
            print(engine.plan, file=sys.stderr)
            yield engine

    def link(self) -> float:
        """Bytes per second from pinned memory: the best that was seen."""
        device = open_device(DEVICE)
        assert device is not None, "a processor has no link"
        with device.use():
            self.links.append(rates.link_rate(DEVICE))
        return max(self.links)


def draw(length: int, seed: int) -> list[int]:
    """Random ordinary tokens."""
    chance = random.Random(f"{length} {seed}")
    return [chance.randrange(10, 1000) for _ in range(length)]


def sweep_seconds(engine: LayerStream, num_sequences: int, steps: int) -> float:
    """Of a sweep in which *num_sequences* decode: what *steps* more tokens of each take."""
    taken = []
    for tokens in (2, 2, 2 + steps):  # the first time warms
        prompts = [draw(PROMPT, index) for index in range(num_sequences)]
        started = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        taken.append(time.perf_counter() - started)
    return (taken[2] - taken[1]) / steps


def say_sweeps(bench: Bench, engine: LayerStream) -> None:
    """Sweeps with any number of sequences beside the link's limit."""
    streamed = engine.plan.streamed_bytes
    bench.link()
    for count in bench.setting.sequences:
        seconds = sweep_seconds(engine, count, bench.setting.steps)
        bench.say(f"{count} decode", seconds=seconds, limit_seconds=streamed / bench.link(), streamed=streamed)


def say_prefills(bench: Bench, engine: LayerStream) -> None:
    """Seconds to the first token of long prompts."""
    for length in bench.setting.prefills:
        started = time.perf_counter()
        engine.generate([draw(length, 0)], SamplingParams(max_tokens=1, temperature=0.0))
        bench.say(f"first token of {length}", seconds=time.perf_counter() - started)


def say_memory(bench: Bench, engine: LayerStream) -> None:
    """What was taken of the device, beside its ceiling."""
    stats = engine.stats()
    bench.say("memory", peak=stats.peak_memory_bytes, budget=stats.budget_bytes)
    assert stats.peak_memory_bytes <= stats.budget_bytes, "past the ceiling"


def link(bench: Bench) -> None:
    """The card, and its link alone."""
    bench.say("versions", torch=torch.__version__, device=device_name(DEVICE), cuda=str(torch.version.cuda))
    bench.say("link", bytes_per_second=bench.link())


def kernels(bench: Bench) -> None:
    """Which kernels the card was found to have."""
    device = open_device(DEVICE)
    assert device is not None, "a processor has none of them"
    bench.say("decode rows where all stays", rows=device_rows(DEVICE))
    with device.use(), torch.inference_mode():
        for dtype, width in HEADS:
            queries, pool = (torch.zeros((8, heads, width), dtype=dtype).to(device.torch_device) for heads in (32, 8))
            for needs_sums in (False, True):
                kernel = choose(queries, pool, pool, needs_sums=needs_sums)
                name = "none" if kernel is None else kernel.__name__
                sinks = ", with sinks" if needs_sums else ""
                bench.say(f"attention, {dtype}, heads of {width}{sinks}", kernel=name)
        bench.say("grouped products", has=grouped_experts.has_kernel(device.torch_device, torch.bfloat16))


def tests(bench: Bench) -> None:
    """Those for a real card; on a pretended one there are none."""
    if bench.setting.is_pretended:
        bench.say("no tests on a pretended card")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "card", "tests/on_a_card"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, file=sys.stderr)
    bench.say("tests", said=(done.stdout.strip().splitlines() or ["nothing"])[-1])
    assert done.returncode == 0, "some failed"


def bf16(bench: Bench) -> None:
    """Weights that cross the link."""
    _crossing(bench, "dense")


def nf4(bench: Bench) -> None:
    """The same in four bits."""
    _crossing(bench, "dense-nf4")


def _crossing(bench: Bench, name: str) -> None:
    with bench.engine(name) as engine:
        say_sweeps(bench, engine)
        say_prefills(bench, engine)
        say_memory(bench, engine)


def resident(bench: Bench) -> None:
    """Everything on the device, with graphs and without, where there are any."""
    for options in GRAPHS:
        with bench.engine("dense", _resident_memory(bench), **options) as engine:
            assert not engine.plan.streams, "something streams"
            for count in bench.setting.sequences:
                what = f"{count} decode{', no graphs' if options else ''}"
                bench.say(what, seconds=sweep_seconds(engine, count, 4 * bench.setting.steps))
            if not options:
                say_prefills(bench, engine)


def _resident_memory(bench: Bench) -> str:
    return "1GiB" if bench.setting.is_pretended else RESIDENT


def experts(bench: Bench) -> None:
    """A mixture whose experts are in host memory."""
    with bench.engine("mixture") as engine:
        say_sweeps(bench, engine)
        used = engine.stats().experts
        if used is not None:
            bench.say("experts", slots=used.num_slots, on_device=used.device_slots, by_processor=used.host_computed)
        say_memory(bench, engine)


def large(bench: Bench) -> None:
    """Right answers, one by one and all at once, and what a sweep takes."""
    asked = draw_questions(AutoTokenizer.from_pretrained(bench.model("large")), FACTS, max(bench.setting.sequences[:3]))
    params = SamplingParams(max_tokens=12, temperature=0.0)
    with bench.engine("large") as engine:
        for group in (asked[:1], asked):
            before, started = engine.stats(), time.perf_counter()
            answers = engine.generate([prompt for prompt, _ in group], params)
            seconds, sweeps = time.perf_counter() - started, engine.stats().sweeps - before.sweeps
            right = sum(a.token_ids[: len(b)] == b for a, (_, b) in zip(answers, group, strict=True))
            limit = engine.plan.streamed_bytes / bench.link()
            bench.say(
                f"{len(group)} questions, a sweep",
                seconds=seconds / sweeps,
                limit_seconds=limit,
                right=f"{right} of {len(group)}",
                per_minute=60 * len(group) / seconds,
            )
        say_memory(bench, engine)


def bits(bench: Bench) -> None:
    """The same answers have the same bits: again, among neighbours, and without graphs."""
    prompts = [draw(20 + 7 * index, index) for index in range(QUESTIONS)]
    places = {"from the host": (None, GRAPHS[:1]), "resident": (_resident_memory(bench), GRAPHS)}
    differ = []
    for place, (memory, variants) in places.items():
        seen: list[tuple[str, list[Any]]] = []
        for options in variants:
            with bench.engine("dense", memory, **options) as engine:
                name = ", without graphs" if options else ""
                for time_ in ("alone", "again"):
                    scores = [scores for prompt in prompts for scores in _scores(engine, [prompt])]
                    seen.append((f"{place}, {time_}{name}", scores))
                seen.append((f"{place}, among neighbours{name}", _scores(engine, prompts)))
        first = seen[0][1]
        for name, found in seen[1:]:
            equal = sum(a == b for a, b in zip(first, found, strict=True))
            bench.say(name, equal=f"{equal} of {len(first)}")
            differ += [name] if equal < len(first) else []
    assert not differ, f"bits differ: {differ}"


def _scores(engine: LayerStream, prompts: list[list[int]]) -> list[Any]:
    """Tokens and their log-probabilities, of every answer."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
    return [(answer.token_ids, repr(answer.logprobs)) for answer in engine.generate(prompts, params)]


def trace(bench: Bench) -> None:
    """Of a few sweeps in four bits, for ui.perfetto.dev."""
    with bench.engine("dense-nf4") as engine:
        prompts = [draw(PROMPT, index) for index in range(8)]
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        engine.generate(prompts, params)
        with engine.record() as timeline:
            engine.generate(prompts, params)
        timeline.write_chrome(bench.out / "trace.json")
        spans = [span.stop - span.start for span in timeline.spans() if span.track == "copy"]
        bench.say("trace.json", copies=len(spans), seconds=statistics.median(spans) if spans else None)


def peers_resident(bench: Bench) -> None:
    """Plain transformers with everything on the card: eager, and compiled with a static cache."""
    peers.resident(bench.model("dense"), bench.setting, bench.say)


def peers_offload(bench: Bench) -> None:
    """accelerate with as much of the device as the engine had."""
    peers.offload(bench.model("dense"), bench.setting, bench.say)


_ALL = (link, kernels, tests, bf16, nf4, resident, experts, large, bits, trace, peers_resident, peers_offload)
STAGES: dict[str, Callable[[Bench], None]] = {stage.__name__: stage for stage in _ALL}


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    setting = TINY if options.tiny else CARD
    with _pretending() if setting.is_pretended else contextlib.nullcontext():
        STAGES[options.stage](Bench(options.stage, setting, options.work, options.out))


@contextlib.contextmanager
def _pretending() -> Iterator[None]:
    import pytest

    from tests.harness import shrink_units
    from tests.pretend import pretend_cuda

    with pytest.MonkeyPatch.context() as patches:
        shrink_units(patches)
        patches.setattr(rates, "LINK_BYTES", 2**20)
        with pretend_cuda(patches):
            yield


if __name__ == "__main__":
    main()
