"""How much a model's experts were used lately, remembered from one process to the next.

One small file for each model, in the user's cache folder or the one that ``LAYERSTREAM_EXPERTS`` names. It decides only
what is in memory first, and what a plan promises: a file that is damaged, or of other weights, is as good as none.
Of two processes the later one wins.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from layerstream.hardware.machine import cache_folder
from layerstream.hardware.remembered import Remembered
from layerstream.planner.units import ExpertsNode

logger = logging.getLogger(__name__)

VARIABLE = "LAYERSTREAM_EXPERTS"
SAVE_SECONDS = 300.0  # what a process that is killed forgets at most
DIGITS = 4


class ExpertUsage:
    """The file for a model whose weights are in *files*, and its experts those of *nodes*."""

    def __init__(self, files: Iterable[Path], nodes: Sequence[ExpertsNode]) -> None:
        self._model = _identity(files, nodes)
        self._num_experts = sum(node.num_experts for node in nodes)
        folder = Path(os.environ.get(VARIABLE) or cache_folder() / "experts").expanduser()
        self._file = Remembered(folder / f"{self._model[:24]}.json")
        self._saved = time.monotonic()

    def load(self) -> tuple[float, ...]:
        """For each expert how much it was used, but for a factor; nothing if that is not known."""
        found = self._file.read()
        if found.get("model") != self._model:
            return ()
        try:
            shares = tuple(float(share) for share in found["shares"])
        except (KeyError, TypeError, ValueError) as error:
            logger.info("%s is no record of experts' use and is ignored: %s", self._file.path, error)
            return ()
        is_whole = len(shares) == self._num_experts and all(math.isfinite(share) and share >= 0 for share in shares)
        return shares if is_whole else ()

    def save(self, shares: Iterable[float]) -> None:
        """Remember *shares*; where that is not possible, nothing is lost but a warm start."""
        record = {"model": self._model, "shares": [round(float(share), DIGITS) for share in shares]}
        try:
            self._file.replace(record)
        except OSError as error:
            logger.info("%s cannot be written: %s", self._file.path, error)
        self._saved = time.monotonic()

    def save_sometimes(self, shares: Callable[[], Iterable[float]]) -> None:
        """Remember *shares* if that was not done for a while."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save(shares())


def _identity(files: Iterable[Path], nodes: Sequence[ExpertsNode]) -> str:
    """Other weights have another one, the same weights in another folder the same."""
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(set(files))]
    blocks = [(node.name, node.num_experts, node.top_k, node.expert_bytes) for node in nodes]
    return hashlib.sha256(repr((stats, blocks)).encode()).hexdigest()
