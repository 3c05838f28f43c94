"""What a config says of the terms of a call: entries of ``configurable``, where every library has its own."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from layerstream.errors import ConfigurationError
from layerstream.handle import TERMS
from pydantic import BaseModel

logger = logging.getLogger(__name__)

_PREFIX = "layerstream_"


def configured_terms(config: RunnableConfig | None = None) -> dict[str, Any]:
    """The terms that *config*, or that of the chain around a call, has; one that is ``None`` there is as the wrapper
    was made."""
    configurable = _configurable(config)
    return {name: configurable[name] for name in TERMS if configurable.get(name) is not None}


def check_names(wrapper: BaseModel, config: RunnableConfig | None = None) -> None:
    """Refuse what is meant for LayerStream and would be ignored: a tenant must not get lost. What else is in there is
    other libraries', or a field of *wrapper* that LangChain's ``configurable_fields`` has set by then.

    Raises:
        ConfigurationError: a term by another name than its own.
    """
    for key, value in _configurable(config).items():
        if not key.lower().startswith(_PREFIX):
            continue
        name = key[len(_PREFIX) :].lower()
        if name in type(wrapper).model_fields and getattr(wrapper, name) == value:
            continue
        if close := difflib.get_close_matches(name, TERMS, 1):
            raise ConfigurationError(
                f"configurable has {key!r}, which has no effect; here it is called {close[0]!r}, and there are "
                f"{', '.join(map(repr, TERMS))}"
            )
        _say_that_it_has_no_effect(key)


def _configurable(config: RunnableConfig | None) -> Mapping[str, Any]:
    return ensure_config(config).get("configurable") or {}


@functools.cache
def _say_that_it_has_no_effect(key: str) -> None:
    logger.warning(
        "configurable has %r, which has no effect; there are %s, and llm.configurable_fields(...) makes other fields "
        "configurable",
        key,
        ", ".join(map(repr, TERMS)),
    )
