"""From a configuration to a plan: what is known of the model and of the machine before a weight is read.

Of the model, headers and ``config.json`` are read. Of the machine, free memory is asked for; which kernels are faster
here than decoding is measured once for each machine, and remembered in a file (:mod:`layerstream.model.kernels`).
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from math import prod
from pathlib import Path

import torch

from layerstream.checkpoint.hub import locate
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.accelerators import accelerator_of, all_devices, free_bytes, is_there, resolve_device
from layerstream.hardware.machine import available_memory_bytes
from layerstream.kv.shape import StateShape
from layerstream.model.attention import has_bf16_products
from layerstream.model.expert_usage import ExpertUsage
from layerstream.model.families import usable_context
from layerstream.model.kernels import fused_rows
from layerstream.model.linear import DEVICE_TILE_VALUES, TILE_VALUES
from layerstream.model.mtp import with_mtp
from layerstream.model.skeleton import Skeleton, build_skeleton
from layerstream.planner import ModelFacts, Plan, comfortable_bytes, make_plan
from layerstream.planner import facts as assumed
from layerstream.planner.beside import SHARE_OF_MEMORY, plan_with_head
from layerstream.planner.on_device import make_device_plan
from layerstream.planner.on_devices import make_devices_plan
from layerstream.setup.config import EngineConfig
from layerstream.setup.device_rows import device_rows
from layerstream.setup.open_store import weight_paths
from layerstream.setup.page_size import choose_page_tokens

logger = logging.getLogger(__name__)

SPARE_SHARE = 0.8  # of the free memory, when no budget was given
DEVICE_WORKSPACE_BYTES = 128 * 2**20  # matrix libraries' buffers, and what an allocator cannot hand out


def plan_model(config: EngineConfig) -> tuple[Plan, Skeleton, Path]:
    """The plan for *config*, the skeleton and the folder it comes from, without reading a weight.

    An accelerator need not be there where ``memory`` is given.

    Raises:
        BudgetTooSmall: names the minimum.
    """
    facts, skeleton, folder = plan_facts(config)
    return spend(config, facts), skeleton, folder


def spend(config: EngineConfig, facts: ModelFacts) -> Plan:
    """The plan for a model of *facts*.

    Raises:
        BudgetTooSmall: names the minimum.
        ConfigurationError: host memory for an accelerator, and there is none.
    """
    plan = plan_with_head(facts, partial(_spend, config), partial(_spend_on_head, config))
    if facts.mtp is not None and plan.mtp is None:
        logger.info("%s: no memory is left for its multi-token-prediction head, which does not draft", config.model)
    return plan


def _spend(config: EngineConfig, facts: ModelFacts, head: Plan | None) -> Plan:
    """The plan for a model of *facts*, beside that of its multi-token-prediction head."""
    if head is not None:
        config = dataclasses.replace(
            config,
            reserved_bytes=config.reserved_bytes + head.planned_bytes,
            reserved_host_bytes=config.reserved_host_bytes + (0 if head.host is None else head.host.planned_bytes),
        )
    if facts.is_on_device:
        return _device_plan(config, facts)
    if config.host_memory_bytes is not None:
        raise ConfigurationError(
            "host_memory is the memory behind an accelerator, and the CPU computes in 'memory': leave it at None"
        )
    return _with_free(make_plan(facts, _budget(config, facts)), config)


def _spend_on_head(config: EngineConfig, facts: ModelFacts) -> Plan:
    """The plan for a multi-token-prediction head within its share of the memory."""
    available = config.memory_bytes or available_bytes(resolve_device(config.device))
    share = int(SHARE_OF_MEMORY * available)
    if not facts.is_on_device:
        return make_plan(facts, share)
    return make_device_plan(facts, share, int(SHARE_OF_MEMORY * (config.host_memory_bytes or available_memory_bytes())))


def _with_free(plan: Plan, config: EngineConfig) -> Plan:
    """*plan*, which says so where its budget is more than there is."""
    device = resolve_device(config.device)
    if config.memory_bytes is not None and is_there(device) and config.memory_bytes > (free := available_bytes(device)):
        plan = dataclasses.replace(plan, free_bytes=free)
    if plan.host is not None and (config.host_memory_bytes or 0) > (free := available_memory_bytes()):
        plan = dataclasses.replace(plan, host=dataclasses.replace(plan.host, free_bytes=free))
    return plan


def devices_of(config: EngineConfig) -> list[torch.device]:
    """What may compute; an accelerator need not be there where ``memory`` is given.

    Raises:
        ConfigurationError: there is none, and its memory is to be planned with.
    """
    if config.device_map is None:
        return [resolve_device(config.device)]
    return all_devices(len(config.memory_each) or None)


def available_bytes(device: torch.device) -> int:
    """Memory that is free where *device* computes.

    Raises:
        ConfigurationError: there is no such device.
    """
    return available_memory_bytes() if accelerator_of(device) is None else free_bytes(device)


def plan_facts(config: EngineConfig) -> tuple[ModelFacts, Skeleton, Path]:
    """What the plan for *config* depends on, the skeleton and the folder it comes from."""
    folder = config.packed or locate_model(config)
    is_on_device = config.device_map is not None or accelerator_of(resolve_device(config.device)) is not None
    skeleton = build_skeleton(
        folder,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        allow_untested=config.allow_untested,
        tile_values=DEVICE_TILE_VALUES if is_on_device else TILE_VALUES,
    )
    if config.speculation != "off" and config.device_map is None:  # where several compute, nobody has all it needs
        skeleton = with_mtp(skeleton, folder, trust_remote_code=config.trust_remote_code)
    longest, wanted = usable_context(skeleton.config), config.max_context or 0
    context_length = min(longest, wanted or longest)
    if wanted > longest:
        logger.warning("max_context is %d, and the model's context has %d tokens: that is it", wanted, longest)
    facts = model_facts(
        skeleton,
        context_length,
        config.chunk_tokens,
        can_spill=config.kv_store is not None,
        compression="none" if config.kv_store is None else config.kv_store.compression,
        is_on_device=is_on_device,
        device_rows=device_rows(devices_of(config)[0]) if is_on_device else None,
    )
    facts = dataclasses.replace(facts, wanted_context=wanted if wanted > longest else 0)
    if facts.experts and is_on_device and config.host_compute == "auto":
        facts = dataclasses.replace(facts, host_fused_rows=fused_rows(skeleton.kernels))
    if facts.experts:
        statistics = ExpertUsage(weight_paths(skeleton), facts.experts)
        facts = dataclasses.replace(facts, expert_shares=statistics.load())
    return facts, skeleton, folder


def _device_plan(config: EngineConfig, facts: ModelFacts) -> Plan:
    host_bytes = config.host_memory_bytes or int(available_memory_bytes() * SPARE_SHARE)
    host_bytes -= config.reserved_host_bytes
    if config.device_map is None:
        plan = _with_free(make_device_plan(facts, _budget(config, facts), host_bytes), config)
    else:
        plan = make_devices_plan(facts, config.device_map, _memories(config), host_bytes)
    assert plan.host is not None
    if config.host_memory_bytes is None:  # it was not asked for, so no more of it is taken than has a use
        plan = dataclasses.replace(plan, host=dataclasses.replace(plan.host, budget_bytes=plan.host.planned_bytes))
    return plan


def model_facts(
    skeleton: Skeleton,
    context_length: int,
    chunk_tokens: int | None = None,
    *,
    can_spill: bool = False,
    compression: str = "none",
    is_on_device: bool = False,
    device_rows: int | None = None,
) -> ModelFacts:
    """What a plan depends on: sizes from the skeleton, and on the processor which of its kernels are fast here.

    The first call on a machine for a quantised model measures those, for some seconds, and writes a file.

    Args:
        compression: of the KV store.
    """
    config, traced = skeleton.config, skeleton.trace
    mtp = None
    if skeleton.mtp is not None:
        mtp = model_facts(
            skeleton.mtp, context_length, chunk_tokens, is_on_device=is_on_device, device_rows=device_rows
        )
    itemsize = skeleton.dtype.itemsize
    layer_kv = tuple(layer.values * itemsize for layer in traced.layers)
    embedding = skeleton.sources[skeleton.embedding_key]
    embedding_bytes = prod(embedding.shape) * itemsize
    widest = max((module.out_features for module in _linears(skeleton)), default=4 * config.hidden_size)
    fused = {} if is_on_device else fused_rows(skeleton.kernels)
    resident_rows = assumed.RESIDENT_ROWS
    if is_on_device and not traced.is_alone:
        streaming_rows, resident_rows = assumed.DEVICE_ROWS, device_rows or assumed.DEVICE_ROWS
    elif is_on_device:  # a block has one row in use
        streaming_rows = resident_rows
    elif skeleton.decodes(fused):
        streaming_rows = assumed.DECODING_STREAMING_ROWS
    else:
        is_fast = skeleton.dtype == torch.bfloat16 and has_bf16_products()
        streaming_rows = assumed.FAST_STREAMING_ROWS if is_fast else assumed.STREAMING_ROWS
    shapes = [None if layer.recurrent is None else layer.recurrent.shape for layer in traced.layers]
    resident_chunk = streaming_chunk = assumed.CHUNK_TOKENS
    if is_on_device:
        resident_chunk = streaming_chunk = assumed.DEVICE_CHUNK_TOKENS
    elif any(shapes):
        resident_chunk = streaming_chunk = assumed.RECURRENT_CHUNK_TOKENS
    elif traced.is_alone:
        resident_chunk = assumed.ALONE_CHUNK_TOKENS
    page_tokens = 0
    if not (is_on_device or any(shapes)):  # kernels see spans as they are there, and states lie between chunks
        kept = [layer.kept for layer in traced.layers if layer.kept is not None]
        page_tokens = choose_page_tokens(kept, compression, chunk_tokens or assumed.CHUNK_TOKENS)
    return ModelFacts(
        body=skeleton.body,
        routed_body=skeleton.routed_body,
        experts=skeleton.routed,
        head=skeleton.head,
        embedding_bytes=0 if skeleton.is_tied else embedding_bytes,
        layer_kv=layer_kv,
        hidden_size=config.hidden_size,
        intermediate_size=widest,
        vocab_size=skeleton.head.num_rows,
        itemsize=itemsize,
        context_length=context_length,
        chunk_tokens=chunk_tokens or resident_chunk,
        streaming_chunk_tokens=chunk_tokens or streaming_chunk,
        page_tokens=page_tokens,
        streaming_rows=streaming_rows,
        resident_rows=resident_rows,
        prompt_rows=assumed.DEVICE_PROMPT_ROWS if is_on_device else assumed.PROMPT_ROWS,
        resident_prompt_rows=0 if is_on_device else assumed.RESIDENT_PROMPT_ROWS,
        sweep_tokens=assumed.DEVICE_SWEEP_TOKENS if is_on_device else assumed.MAX_SWEEP_TOKENS,
        fused_rows=fused,
        num_values=skeleton.num_values,
        attended_kv_bytes=max(layer_kv, default=0),
        hidden_copies=traced.copies,
        lasting_kv_bytes=sum(layer_kv[traced.keepers[number]] for number in traced.lasting),
        layer_row_bytes=_layer_row_bytes(skeleton),
        can_spill=can_spill and not is_on_device,
        is_on_device=is_on_device,
        workspace_bytes=DEVICE_WORKSPACE_BYTES if is_on_device else 0,
        mtp=mtp,
        layer_state=tuple(0 if shape is None else shape.num_bytes for shape in shapes),
        layer_state_row=tuple(0 if shape is None else _scan_row_bytes(shape, itemsize) for shape in shapes),
    )


def locate_model(config: EngineConfig) -> Path:
    """Where the files of the model that was asked for lie; they are fetched if they are not here."""
    return locate(
        config.model, revision=config.revision, token=config.token, trust_remote_code=config.trust_remote_code
    )


def _budget(config: EngineConfig, facts: ModelFacts) -> int:
    """The caller's budget, or what the model wants within what the machine, or its accelerator, has free."""
    if facts.is_on_device and config.memory_bytes is not None:
        return max(1, config.memory_bytes - config.reserved_bytes)  # it need not be there, to plan for it
    available = available_bytes(resolve_device(config.device))
    if config.memory_bytes is None:
        return max(1, min(comfortable_bytes(facts), int(available * SPARE_SHARE) - config.reserved_bytes))
    if config.memory_bytes > available:
        logger.warning(
            "the memory budget of %s is more than the %s that are free",
            format_size(config.memory_bytes),
            format_size(available),
        )
    return max(1, config.memory_bytes - config.reserved_bytes)


def _memories(config: EngineConfig) -> list[int]:
    """The budget of each of several accelerators."""
    found = list(config.memory_each)
    if not found:
        given = config.memory_bytes
        found = [int(free_bytes(d) * SPARE_SHARE) if given is None else given for d in devices_of(config)]
    found[0] -= config.reserved_bytes
    return [max(1, size) for size in found]


def _layer_row_bytes(skeleton: Skeleton) -> int:
    """Of a second table of embeddings: a row as it is stored, and thrice as it is computed with (looked up, packed with
    others, and joined with what the model makes of the first embedding)."""
    if (key := skeleton.layer_embedding_key) is None:
        return 0
    source = skeleton.sources[key]
    return source.num_bytes // source.shape[0] + 3 * source.shape[1] * skeleton.dtype.itemsize


def _scan_row_bytes(shape: StateShape, itemsize: int) -> int:
    """What the scans of a layer with a state of *shape* are given for a row, at most.

    A convolution is given its channels. What a recurrence adds to a matrix is an outer product, of one vector along
    each side; a query or a gate may come for each.
    """
    values = 0
    for part in shape.parts:
        *outer, rows, columns = 1, *part.shape
        values += rows if part.name == "conv" else 2 * prod(outer) * (rows + columns)
    return values * itemsize


def _linears(skeleton: Skeleton) -> list[torch.nn.Linear]:
    return [module for module in skeleton.decoder.modules() if isinstance(module, torch.nn.Linear)]
