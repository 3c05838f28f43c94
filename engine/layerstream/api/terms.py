"""What a call says beside its prompt and how tokens are drawn: :class:`Terms`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.api import arguments

MOST_PRIORITY = 10**6


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a request is taken: seconds until it is given up, its place in the queue, whose it is, and which
    texts in its prompt other prompts have as well.

    Raises:
        ConfigurationError: one of them cannot be meant; names it.
    """

    timeout: float | None = None
    priority: int = 0
    client: str = ""
    tenant: str = ""
    passages: Sequence[str] | None = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "timeout", arguments.seconds("timeout", self.timeout, above_zero=True))
        set_(self, "priority", arguments.whole_number("priority", self.priority, -MOST_PRIORITY, MOST_PRIORITY))
        set_(self, "client", arguments.text("client", self.client))
        set_(self, "tenant", arguments.text("tenant", self.tenant))
        if self.passages is not None:
            set_(self, "passages", arguments.texts("passages", self.passages))
