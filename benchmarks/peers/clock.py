"""What every runner does the same way; imported by scripts in other environments, so only the standard library."""

from __future__ import annotations

import json
import time


class Clock:
    """Times tokens; is a transformers streamer (``put`` once for the prompt, then once for each token)."""

    def __init__(self) -> None:
        self._opened = time.perf_counter()
        self._open_seconds = 0.0
        self._marks: list[float] = []
        self._token_ids: list[int] = []

    def ready(self) -> None:
        """The model is open."""
        self._open_seconds = time.perf_counter() - self._opened

    def put(self, value: object) -> None:
        """A token was made, or the prompt was seen."""
        ids = value.flatten().tolist() if hasattr(value, "flatten") else [value]
        if self._marks:
            self._token_ids.extend(ids)
        self._marks.append(time.perf_counter())

    def end(self) -> None:
        """Generation is over."""

    def report(self) -> None:
        """Print the figures for the parent."""
        steps = [later - earlier for earlier, later in zip(self._marks, self._marks[1:], strict=False)]
        figures = {
            "open_seconds": self._open_seconds,
            "first_token_seconds": steps[0],
            "token_seconds": steps[1:],
            "token_ids": self._token_ids,
        }
        print("\n" + json.dumps(figures), flush=True)


def prompt_ids(count: int) -> list[int]:
    """The prompt of every runner: token ids that any vocabulary of a thousand has."""
    return [5 + index * 7 % 900 for index in range(count)]
