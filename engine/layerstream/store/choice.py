"""Load a stored prefix or compute it again, whichever is faster. Pure.

A sweep with n prompt tokens takes ``max(read, c·n)`` seconds, where *read* is what its streamed weights take and c the
compute per token. A sweep is needed either way, so a prefix costs only what goes beyond it: while the disk is the
slower side, tokens up to ``read / c`` are free and loading them could only lose (the break-even length N* of the
design). Loading costs its bytes at the disk's rate, on top of the weights'.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured so far.

    Attributes:
        read_bytes_per_second: of the disk.
        weight_seconds: what reading the streamed weights of one sweep takes.
        max_sweep_tokens: prompt tokens that one sweep carries.
    """

    read_bytes_per_second: float
    weight_seconds: float
    max_sweep_tokens: int


def load_seconds(num_bytes: int, rates: Rates) -> float:
    """What loading costs beside the sweep that is needed anyway."""
    return num_bytes / rates.read_bytes_per_second


def recompute_seconds(num_tokens: int, compute_seconds: float, rates: Rates) -> float:
    """What computing *num_tokens*, which take *compute_seconds*, costs beside the sweep that is needed anyway."""
    num_sweeps = -(-num_tokens // rates.max_sweep_tokens)
    return max(num_sweeps * rates.weight_seconds, compute_seconds) - rates.weight_seconds


def break_even_tokens(compute_seconds_per_token: float, kv_token_bytes: int, rates: Rates) -> float:
    """Tokens from which on loading is faster; at most what one sweep carries."""
    saved = compute_seconds_per_token - kv_token_bytes / rates.read_bytes_per_second
    return min(rates.max_sweep_tokens, rates.weight_seconds / saved if saved > 0 else float("inf"))
