"""Blending ends where answers agree too rarely, and not before."""

from __future__ import annotations

import logging

import pytest
from layerstream.runtime.guard import LEAST, ONE_IN, WINDOW, Guard


def test_the_first_answers_are_compared_and_then_one_of_many() -> None:
    guard = Guard()
    wanted = []
    for _ in range(200):
        wanted.append(guard.wants(0))
        if wanted[-1]:
            guard.record(agrees=True)
    assert all(wanted[:LEAST])
    assert sum(wanted[LEAST:]) == 200 // ONE_IN
    assert not Guard().wants(num_waiting=LEAST), "as many are going to be compared"


def test_a_few_that_differ_end_nothing() -> None:
    guard = Guard()
    for _ in range(LEAST - 1):
        guard.record(agrees=False)
    assert guard.is_blending
    assert guard.agreement == 0.0


def test_too_many_that_differ_end_it_for_good(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    with caplog.at_level(logging.WARNING):
        for number in range(LEAST):
            guard.record(agrees=number < LEAST // 2)
    assert not guard.is_blending
    assert "reuse='anywhere'" in caplog.text
    for _ in range(WINDOW):
        guard.record(agrees=True)
    assert not guard.is_blending
    assert guard.agreement == 1.0
