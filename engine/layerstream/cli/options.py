"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str, typer.Option(envvar="LAYERSTREAM_MODEL", help="A folder, a hub id, or 'demo' for the bundled reader.")
]
Memory: TypeAlias = Annotated[
    str | None, typer.Option(help="The budget where it computes, such as 3GiB; 10GiB,4GiB: of several devices.")
]
DeviceMap: TypeAlias = Annotated[
    str | None, typer.Option(help="Layers on several CUDA devices: auto, balanced, sequential.")
]
HostMemory: TypeAlias = Annotated[
    str | None, typer.Option(help="Host memory behind an accelerator; what has a use if not given.")
]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]


def split(memory: str | None) -> str | list[str] | None:
    """A budget, or those of several devices, as ``LayerStream`` takes them."""
    return memory.split(",") if memory is not None and "," in memory else memory
