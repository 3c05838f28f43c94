"""``layerstream plan``: what would fit where, before a weight is read."""

from __future__ import annotations

from typing import Annotated

import typer

from layerstream.kv.config import store_config
from layerstream.sizes import parse_size


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or 'demo'.")],
    memory: Annotated[str | None, typer.Option(help="The budget, such as 3GiB; what is free if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in: auto, bfloat16, float16, float32.")] = "auto",
) -> None:
    """Show how a memory budget would be spent on a model."""
    from layerstream.config import EngineConfig
    from layerstream.sizing import plan_model

    budget = None if memory is None else parse_size(memory)
    config = EngineConfig(model, memory_bytes=budget, dtype=dtype, kv_store=store_config("auto"))
    typer.echo(plan_model(config)[0])
