"""A picture of one sweep: reads, copies and compute, as the plan foresees them beside what they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerstream.api.params import SamplingParams
from layerstream.engine import LayerStream
from layerstream.errors import ConfigurationError, MissingExtra
from layerstream.hardware.files import check_writable
from layerstream.hardware.timeline import TimeSpan
from layerstream.planner.forecast import Forecast
from layerstream.planner.simulation import Step, simulate
from layerstream.setup.config import EngineConfig

KINDS = ("read", "copy", "compute")
COLOURS = {"read": "#4477aa", "copy": "#66ccee", "compute": "#228833"}
MEASURED_SWEEPS = 4


def check(path: Path) -> None:
    """That a picture can be written to *path*, before anything is measured for it.

    Raises:
        MissingExtra, ConfigurationError: as :func:`draw`.
    """
    kinds = _figure(1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigurationError(f"{path}: a picture's name ends with one of {', '.join(f'.{kind}' for kind in kinds)}")
    check_writable(path)


def draw(config: EngineConfig, forecast: Forecast, path: Path, *, measured: bool = True) -> Path:
    """Write the picture to *path*; *measured*: run the model for a few sweeps, too.

    Raises:
        MissingExtra: there is no matplotlib. ConfigurationError: *path* is of no kind that it writes, or cannot be
            written.
    """
    check(path)
    rows: list[tuple[str, Sequence[Step]]] = [("predicted", simulate(forecast))]
    if measured:
        rows.append(("measured", measure(config)))
    rows = [(name, [step for step in steps if step.kind in KINDS]) for name, steps in rows]
    figure = _figure(len(rows))
    axes: Any = figure.subplots()
    labels: list[tuple[float, str]] = []
    at = 0.0
    for name, steps in rows:
        for kind in KINDS:
            bars = [(step.start, step.stop - step.start) for step in steps if step.kind == kind]
            if bars:
                axes.broken_barh(bars, (at - 0.4, 0.8), facecolors=COLOURS[kind], alpha=0.8)
                labels.append((at, f"{name}: {kind}"))
                at -= 1
        at -= 0.5
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.set_xlabel("seconds since the sweep began; reads before it and after it are other sweeps' shares")
    axes.set_title(f"{Path(config.model).name}: one sweep of one token")
    axes.axvline(0, color="black", linewidth=0.5)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return path


def _figure(num_rows: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    return Figure(figsize=(12, 1.2 + 1.1 * num_rows), layout="constrained")


def measure(config: EngineConfig) -> list[Step]:
    """What a sweep of one token was, of a model that runs with *config*."""
    with LayerStream(
        config.model,
        device=config.device,
        device_map=config.device_map,
        memory=config.memory_each or config.memory_bytes,
        host_memory=config.host_memory_bytes,
        dtype=config.dtype,
        kv_store=None,
        speculation="off",
    ) as engine:
        params = SamplingParams(max_tokens=MEASURED_SWEEPS, ignore_eos=True)
        prompt = engine.encode("a")[:1]
        engine.generate([prompt], params)
        with engine.record() as timeline:
            engine.generate([prompt], params)
        first = engine.plan.weights.units[0].name
    return one_sweep(timeline.spans(), first)


def one_sweep(spans: Sequence[TimeSpan], first: str) -> list[Step]:
    """The last whole sweep among *spans*, each of which begins with the unit *first*."""
    starts = [span.start for span in spans if span.track == "compute" and span.name == first]
    begin, end = (starts[-2], starts[-1]) if len(starts) > 1 else (starts[-1], float("inf"))
    found = []
    for span in spans:
        kind = "read" if span.track.startswith("reader") else span.track
        if span.stop > begin and span.start < end:
            found.append(Step(kind, span.name, span.start - begin, min(span.stop, end) - begin))
    return found
