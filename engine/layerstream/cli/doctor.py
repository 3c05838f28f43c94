"""``layerstream doctor``: whether this machine has what streaming needs, and what to do where it has not.

With a model: whether its family gives here what it gives in plain transformers.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from layerstream import __version__
from layerstream.cli.failures import FAILED
from layerstream.cli.report import format_streamed
from layerstream.core.sizes import format_size

Verdict = Literal["ok", "note", "warn", "bad"]
MARKS: dict[Verdict, str] = {"ok": "✓", "note": "·", "warn": "!", "bad": "✗"}
LITTLE_DISK = 20 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; *advice* says what to do where it is not as it should be."""

    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def doctor(
    checked: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Compare a shrunken copy of this one with plain transformers instead."),
    ] = None,
    model: Annotated[str, typer.Option(help="Look at the disk of this model as well.")] = "demo",
    again: Annotated[bool, typer.Option("--again", help="Measure rates anew.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")
    ] = False,
) -> None:
    """Check drivers, memory, disks and versions, and measure what plans are made with (ten seconds, once).

    With MODEL: build a small random model as its config says, and compare what this engine and plain transformers make
    of it (half a minute; of the model itself the config alone is read). Exits 1 if something does not work.
    """
    if checked is None:
        _show(_findings(model, again))
    else:
        _show(_comparison(checked, revision, trust_remote_code))


def _show(findings: Iterator[Finding]) -> None:
    """Print what was found.

    Raises:
        typer.Exit: something is bad.
    """
    verdicts: set[Verdict] = set()
    for finding in findings:
        typer.echo(f"{MARKS[finding.verdict]} {finding.name:<16}{finding.value}".rstrip())
        if finding.advice:
            typer.echo(f"  {'':<16}{finding.advice}")
        verdicts.add(finding.verdict)
    typer.echo("\nsomething needs a look" if verdicts & {"warn", "bad"} else "\nall is well")
    if "bad" in verdicts:
        raise typer.Exit(FAILED)


def _comparison(model: str, revision: str | None, trust_remote_code: bool) -> Iterator[Finding]:
    from layerstream.checkpoint.hub import locate_headers
    from layerstream.setup.config import EngineConfig
    from layerstream.setup.self_check import self_check

    config = EngineConfig(model, revision=revision, trust_remote_code=trust_remote_code)
    found = self_check(locate_headers(model, revision=revision), config)
    listed = "on the tested list" if found.is_tested else "not on the tested list: allow_untested=True runs it"
    yield Finding("family", found.family, "ok" if found.is_tested else "note", listed)
    yield Finding("compared", found.method)
    for layers in found.layers:
        yield Finding("layers", layers)
    for run in found.runs:
        yield Finding("", f"{run.mode}: {run.found}", "ok" if run.agrees else "bad")
    if not found.agrees:
        advice = "this engine does not run it: use another family, or plain transformers"
        yield Finding("verdict", "it would give wrong answers", "bad", advice)


def _findings(model: str, again: bool) -> Iterator[Finding]:
    import torch
    import transformers

    yield Finding("versions", f"layerstream {__version__}, Python {platform.python_version()}")
    yield Finding("", f"torch {torch.__version__}, transformers {transformers.__version__}")
    yield from _memory()
    yield from _accelerators()
    yield from _model(model, again)
    yield from _folders()


def _memory() -> Iterator[Finding]:
    from layerstream.hardware.machine import available_memory_bytes

    free = available_memory_bytes()
    verdict: Verdict = "ok" if free >= 2 * 2**30 else "warn"
    yield Finding("memory", f"{format_size(free)} free", verdict, "" if verdict == "ok" else "close other programs")


def _accelerators() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        has_card = Path("/proc/driver/nvidia").exists() or Path("/dev/kfd").exists()
        built = torch.version.cuda or torch.version.hip
        if has_card and not built:
            advice = "there is a card: install a torch for it, see pytorch.org/get-started"
            yield Finding("accelerator", f"torch {torch.__version__} cannot use one", "warn", advice)
        elif built:
            advice = "this torch wants one: look at the driver (nvidia-smi), or pass device='cpu'"
            yield Finding("accelerator", "none found", "warn", advice)
        else:
            yield Finding("accelerator", "none; the processor computes", "note")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", f"{name}, {format_size(free)} of {format_size(total)} free")
    yield from _pinning()


def _pinning() -> Iterator[Finding]:
    """Whether a gigabyte of host memory can be pinned."""
    import torch

    from layerstream.errors import ConfigurationError
    from layerstream.hardware.arena import Arena
    from layerstream.hardware.cuda import CudaDevice

    arena, device = Arena(2**30), CudaDevice(torch.device("cuda"))
    try:
        device.pin(arena)
    except ConfigurationError as error:
        yield Finding("pinned memory", "less than 1 GiB", "warn", str(error))
        return
    device.unpin(arena)
    yield Finding("pinned memory", "1 GiB can be had")


def _model(model: str, again: bool) -> Iterator[Finding]:
    from layerstream.hardware.accelerators import resolve_device
    from layerstream.hardware.machine import network_file_system
    from layerstream.measuring.rates import rates_for, weights_file
    from layerstream.planner.rates import SLOW_DISK
    from layerstream.setup.config import EngineConfig
    from layerstream.setup.plan_model import plan_facts

    _, skeleton, _ = plan_facts(EngineConfig(model))
    file = weights_file(skeleton)
    yield _direct_reads(file)
    if (kind := network_file_system(file)) is not None:
        advice = "every sweep would cross the network: copy the model to a local disk"
        yield Finding("model's folder", f"on {kind}", "warn", advice)
    device = resolve_device("auto")
    rates = rates_for(skeleton, device, again=again)
    slow = rates.disk < SLOW_DISK
    advice = "a model of 10 GB takes minutes a sweep: move it to an SSD, or quantise it" if slow else ""
    yield Finding("disk", f"{format_streamed(int(rates.disk))}/s", "warn" if slow else "ok", advice)
    if rates.link:
        yield Finding("link", f"{format_streamed(int(rates.link))}/s to the device")
    dtype = str(skeleton.dtype).removeprefix("torch.")
    for kind, rows in ((dtype, 1), (dtype, 128)):
        rate = rows * 2e-9 / rates.product_seconds(kind, rows)
        yield Finding("products" if rows == 1 else "", f"{rate:,.0f} GFLOP/s in {kind}, {rows} row{'s' * (rows > 1)}")


def _direct_reads(file: Path) -> Finding:
    from layerstream.hardware.arena import Arena
    from layerstream.hardware.reader import DirectReader, ReadRequest
    from layerstream.streaming.loader import Countdown

    reader, countdown = DirectReader(1), Countdown(1)
    try:
        needed = min(4096, file.stat().st_size)
        reader.submit(ReadRequest(file, 0, 4096, needed, 0), Arena(4096).view, 0, countdown)
        countdown.wait()
        (mode,) = reader.stats.modes
    finally:
        reader.close()
    if mode == "buffered":
        advice = "reads go through the page cache and push other programs' files out of it: use a local disk"
        return Finding("direct reads", "not on this file system", "warn", advice)
    return Finding("direct reads", f"yes ({mode})")


def _folders() -> Iterator[Finding]:
    from layerstream.hardware.machine import cache_folder
    from layerstream.store.config import store_config

    store = store_config("auto")
    if store is not None:
        yield from _folder("KV store", store.path, "answers go on, nothing is kept", "LAYERSTREAM_KV_STORE")
    yield from _folder("cache", cache_folder(), "what was measured or packed is not kept", "XDG_CACHE_HOME")


def _folder(name: str, folder: Path, otherwise: str, variable: str) -> Iterator[Finding]:
    """Whether *folder* can be written, or made; *variable* names another."""
    if reason := why_not_writable(folder):
        advice = f"{otherwise}; {variable}=FOLDER names another"
        yield Finding(name, f"{folder}: {reason}", "bad", advice)
        return
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    advice = "its bounds shrink with it: free some, or name another folder" if free < LITTLE_DISK else ""
    yield Finding(name, f"{folder}")
    yield Finding("", f"{format_size(free)} free", "warn" if advice else "ok", advice)


def why_not_writable(folder: Path) -> str:
    """The reason; empty: it can be written. A file is tried: permissions do not tell of a disk mounted to be read.

    Of a folder that is not there yet, what it would be made in is tried.
    """
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return ""
