"""``python -m layerstream`` is the command ``layerstream``."""

from __future__ import annotations

from layerstream.cli import main

main()
