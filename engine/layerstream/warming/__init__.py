"""Prefill documents ahead of questions: what is behind ``engine.warm``.

A bare document is nobody's prefix: what questions share is the prompt up to where they begin to differ. So every
document goes through the very template that questions use (:mod:`layerstream.warming.prefixes`). The most popular come
first, as far as the store or a budget has room (:mod:`layerstream.warming.choice`, pure); what that takes and brings is
said before (:mod:`layerstream.warming.forecast`). A run (:mod:`layerstream.warming.run`) computes a few at a time, on
the caller's thread or on one of its own (:mod:`layerstream.warming.background`), where it gives way to questions. What
is stored stays, so warming again costs nothing and an interrupted run goes on where it stopped.
"""

from layerstream.warming.background import Warming, WarmProgress
from layerstream.warming.choice import Corpus
from layerstream.warming.forecast import DOCUMENTS_PER_PROMPT, WarmForecast, make_forecast
from layerstream.warming.prefixes import Prefixes, PromptTemplate
from layerstream.warming.run import AT_ONCE, WarmReport, WarmRun

__all__ = [
    "AT_ONCE",
    "DOCUMENTS_PER_PROMPT",
    "Corpus",
    "Prefixes",
    "PromptTemplate",
    "WarmForecast",
    "WarmProgress",
    "WarmReport",
    "WarmRun",
    "Warming",
    "make_forecast",
]
