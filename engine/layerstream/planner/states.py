"""Slots for the states of recurrent layers, as far as a budget goes. Pure.

A slot is room for the states of all recurrent layers of one sequence. A sequence that runs needs two: a sweep reads
its state from one and writes the next one to the other. Slots that no sequence holds keep snapshots of prefixes. The
first of those comes before guesses and all else that there is a choice about: without it no prefix is ever used again.
"""

from __future__ import annotations

from layerstream.planner.facts import ModelFacts

SLOTS_OF_SEQUENCE = 2  # the state that was committed, and the one that a sweep leaves
SNAPSHOT_SLOTS = 8
MOST_SEQUENCES = 32
MOST_SLOTS = SLOTS_OF_SEQUENCE * MOST_SEQUENCES + SNAPSHOT_SLOTS
STATES_SHARE = 0.25  # of the budget where weights stream, else of what they leave: KV and layers want the rest
RESIDENT_STATES_SHARE = 0.5  # of what resident weights and the KV that is wanted first leave; the rest is more KV


def least_state_bytes(facts: ModelFacts) -> int:
    """The slots that one sequence runs with; 0 where no layer keeps a state."""
    return SLOTS_OF_SEQUENCE * facts.state_bytes


def snapshot_bytes(facts: ModelFacts, spare_bytes: int) -> int:
    """Of *spare_bytes*, beyond the least, what the first snapshot takes; 0 where it does not fit."""
    return facts.state_bytes if facts.state_bytes <= spare_bytes else 0


def slots_within(facts: ModelFacts, share_bytes: float, spare_bytes: int) -> int:
    """As many as *share_bytes* hold, one snapshot's at the least, within *spare_bytes* beyond those of one sequence; 0
    where no layer keeps a state."""
    if not facts.state_bytes:
        return 0
    least = least_state_bytes(facts)
    room = min(max(int(share_bytes), least + facts.state_bytes), least + max(0, spare_bytes))
    return max(SLOTS_OF_SEQUENCE, min(MOST_SLOTS, room // facts.state_bytes))


def resident_share_bytes(left_bytes: int, first_kv_bytes: int, most_kv_bytes: int) -> float:
    """What slots may take of what resident weights leave: no less than what KV has no use for."""
    shares = STATES_SHARE * left_bytes, RESIDENT_STATES_SHARE * (left_bytes - first_kv_bytes)
    return max(*shares, left_bytes - most_kv_bytes)


def fewer_sequences(facts: ModelFacts, sequences: int, slots: int) -> int:
    """How many of *sequences* may run at once with so many *slots*."""
    return min(sequences, slots // SLOTS_OF_SEQUENCE) if facts.state_bytes else sequences
