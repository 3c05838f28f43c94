"""A draft model beside the one that streams: how it is opened, and whether both read the same tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall, ConfigurationError
from layerstream.planner import comfortable_bytes
from layerstream.scheduling.states import SLOTS_STEPPING_BACK
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import available_bytes, devices_of, plan_model

SHARE_OF_MEMORY = 0.4  # at most, for the draft model and its KV


def draft_config(config: EngineConfig) -> EngineConfig:
    """That of the engine within the engine which runs *config*'s draft model: resident, beside its first layers.

    Raises:
        ConfigurationError: it does not fit its share of the memory as a whole.
    """
    assert config.draft_model is not None
    own = EngineConfig(
        config.draft_model,
        device=config.device if config.device_map is None else "cuda:0",
        attention=config.attention,
        cuda_graphs=config.cuda_graphs,
        dtype=config.dtype,
        max_context=config.max_context,
        trust_remote_code=config.trust_remote_code,
        token=config.token,
        allow_untested=config.allow_untested,
        speculation="off",
    )
    of_first = config.memory_each[0] if config.memory_each else config.memory_bytes
    available = of_first or available_bytes(devices_of(config)[0])
    share = int(SHARE_OF_MEMORY * available)
    try:
        plan = plan_model(dataclasses.replace(own, memory_bytes=share))[0]
    except BudgetTooSmall:
        plan = None
    if plan is None or plan.streams or 0 < plan.num_slots < SLOTS_STEPPING_BACK:
        raise ConfigurationError(
            f"the draft model {config.draft_model} does not fit into {format_size(share)} ({SHARE_OF_MEMORY:.0%} of "
            "the memory) with its KV, and a draft model has to stay resident: take a smaller one, or give the engine "
            "more memory"
        )
    return dataclasses.replace(own, memory_bytes=min(share, comfortable_bytes(plan.facts)))


def check_same_tokens(config: EngineConfig, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Nothing, if both models read the same tokens.

    Raises:
        ConfigurationError: says how many differ.
    """
    own, other = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if own != other:
        different = len(own.items() ^ other.items())
        raise ConfigurationError(
            f"the draft model {config.draft_model} has another vocabulary than {config.model} ({len(other):,} tokens "
            f"against {len(own):,}, {different:,} entries differ): a draft model must be of the same family of "
            "tokenizers, such as a smaller model of the same series"
        )
