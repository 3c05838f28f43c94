"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str, typer.Option(envvar="LAYERSTREAM_MODEL", help="A folder, a hub id, or 'demo' for the bundled reader.")
]
Memory: TypeAlias = Annotated[
    str | None, typer.Option(help="The budget where it computes, such as 3GiB; what is free if not given.")
]
Memories: TypeAlias = Annotated[
    str | None,
    typer.Option("--memory", help="The budget where it computes, such as 3GiB; 10GiB,4GiB: of several devices."),
]
DeviceMap: TypeAlias = Annotated[
    str | None, typer.Option(help="Layers on several CUDA devices: auto, balanced, sequential.")
]
HostMemory: TypeAlias = Annotated[
    str | None, typer.Option(help="Host memory behind an accelerator; what has a use if not given.")
]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
