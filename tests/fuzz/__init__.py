"""The differential fuzzer: random engines against plain transformers, and against themselves bit for bit.

A case (:mod:`tests.fuzz.cases`) follows from its seed and index alone, so that ``seed:index`` is all that a failure has
to name. :mod:`tests.fuzz.running` lives through a case, :mod:`tests.fuzz.judging` says what is wrong with an answer,
:mod:`tests.fuzz.report` counts. ``make fuzz`` runs cases for hours, ``tests/fuzz/test_fuzz.py`` for seconds.
"""
