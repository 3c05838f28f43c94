"""A campaign of faults over a running engine with neighbours.

A *trial* is an engine, a few requests, and one fault that begins at some moment; it follows from (seed, index) alone
(:mod:`tests.faults.trials`). What every trial has to leave behind is in :mod:`tests.faults.invariants`, what may go
wrong in :mod:`tests.faults.kinds`.

::

    python -m tests.faults --trials 10000 --seed 7     # make faults; a table of counts by kind
    python -m tests.faults --trial 7:1234              # one again, as a failure says
"""
