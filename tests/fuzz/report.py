"""Counts what was tried and what came of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

COUNTED = (
    "models",
    "engines",
    "completions",
    "tokens",
    "against transformers",
    "comparisons of bits",
    "of cached prompts",
    "of guessed tokens",
    "cancelled",
    "damaged files",
)


@dataclass
class Outcome:
    """Of a case, or of many: how often each of :data:`COUNTED`; what failed, and what was refused, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Have what *other* has as well."""
        self.counts.update(other.counts)
        self.failures += other.failures
        self.refusals += other.refusals

    def table(self) -> str:
        """Lines of a name and a number."""
        rows = [*((name, self.counts[name]) for name in COUNTED), *self._lengths().items()]
        return "\n".join(f"{name:<24}{number:>10,}" for name, number in rows)

    def as_json(self) -> dict[str, Any]:
        """The same, and the words."""
        counts = {name: self.counts[name] for name in COUNTED}
        return {**counts, "failures": self.failures, "refusals": self.refusals}

    def _lengths(self) -> dict[str, int]:
        return {"failures": len(self.failures), "refusals": len(self.refusals)}
