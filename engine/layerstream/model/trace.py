"""What a model does with its cache, its masks and its modules, found out by running it once without weights.

The decoder's forward runs over a few rows on the meta device, with a cache, an attention function and a mask function
that only note what they are given. So what a family keeps, attends to and sees is known by what it does, and needs no
list of names:

* what ``Cache.update`` receives is what pages hold: keys and values, or latents;
* attention is given what ``update`` returned, of its own layer or of an earlier one (shared keys and values); where it
  is given anything else, that is made of what was cached (latents are expanded), and needs past rows as well;
* a mixer's scans (:mod:`layerstream.model.recurrence`) say what state they go on from and leave; one that asks the
  cache for a state and calls no scan that is known keeps it in a way that this engine has no say in;
* a mask that was asked for arrives at attention as the very object that the mask function gave, so that its window or
  chunk is known for each layer, and what it lets through is compared with that, position by position;
* a call of the cache that no cache of keys and values has is the mark of another mechanism (:data:`_MECHANISMS`);
* the order in which modules run is the order in which their weights have to come.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface

from layerstream.errors import UnsupportedModel
from layerstream.kv.shape import PageShape, StatePart, StateShape
from layerstream.model.anatomy import Anatomy
from layerstream.model.asked_masks import Asked, Locality, locality, note_mask
from layerstream.model.cache import PagedCache
from layerstream.model.meta import NotThere
from layerstream.model.recurrence import install, mixing, scans_of
from layerstream.model.scans import Call
from layerstream.model.traced import LayerTrace, Recurrent, Trace
from layerstream.model.turning import RotaryNotes, Turn

IMPLEMENTATION = "layerstream-trace"
ROWS = 5  # that run: as many as no other axis is likely to have

_CHANGING = ("position_bias", "block_indices", "indices")  # what attention may be given that changes what it gives
_LISTS = torch.nn.ModuleList | torch.nn.ModuleDict
_BY_ROW = ("mlp", "moe", "dense", "sparse")  # layer types without attention and state
_UNKNOWN_STATE = "it keeps recurrent state by functions that this version does not know"
_MECHANISMS = {
    "linear_cache": _UNKNOWN_STATE,
    "indexer": "it chooses what to attend to by an index that it caches (sparse attention), which this version does "
    "not keep",
}


@dataclass(slots=True)
class _Recorder:
    """What was seen of the run under way."""

    family: str
    paths: Mapping[torch.nn.Module, str]
    cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict[int, Any])
    attended: dict[int, LayerTrace] = field(default_factory=dict[int, LayerTrace])
    mixers: dict[int, str] = field(default_factory=dict[int, str])
    states: dict[int, dict[str, StatePart]] = field(default_factory=dict[int, dict[str, StatePart]])
    order: dict[str, int] = field(default_factory=dict[str, int])
    ran: set[str] = field(default_factory=set[str])
    top_k: dict[str, int] = field(default_factory=dict[str, int])
    copies: int = 1
    counted: set[int] = field(default_factory=set[int])
    running: list[torch.nn.Module] = field(default_factory=list[torch.nn.Module])
    layer_types: Mapping[int, str] = field(default_factory=dict[int, str])
    known: dict[Asked, Locality] = field(default_factory=dict[Asked, Locality])
    rotary: RotaryNotes = field(default_factory=RotaryNotes)
    turns: dict[int, tuple[Turn | None, bool]] = field(default_factory=dict[int, Any])

    def mix(self, layer: int, call: Call) -> Any:
        """Note the state of *call*; of what it gives, the shape is enough."""
        part, parts = call.part, self.states.setdefault(layer, {})
        if part.name in parts:
            raise _cannot_run(
                self.family,
                f"layer {layer} keeps more than one state of a kind ({part.name}), which this version does not do",
            )
        parts[part.name] = part
        return call.joined([], [])

    def locality(self, mask: torch.Tensor | None) -> Locality:
        """Window and chunk of *mask*; see :func:`~layerstream.model.asked_masks.locality`."""
        if mask is None:  # attention alone knows that it is causal
            return None, None
        asked = getattr(mask, "asked", None)
        if not isinstance(asked, Asked):
            raise UnsupportedModel(
                f"{self.family!r} attends under a mask of its own making, which this version cannot apply"
            )
        if asked not in self.known:
            self.known[asked] = locality(self.family, asked)
        return self.known[asked]


_RECORDER: ContextVar[_Recorder] = ContextVar("layerstream_trace")


def trace(anatomy: Anatomy) -> Trace:
    """Run the decoder of *anatomy*, which is on the meta device, once.

    Raises:
        UnsupportedModel: it does what this engine has no say in; says what.
    """
    paths = {module: path for path, module in anatomy.model.named_modules()}
    recorder = _Recorder(anatomy.model.config.model_type, paths)
    recorder.layer_types = dict(enumerate(getattr(anatomy.decoder.config, "layer_types", None) or ()))
    for module in anatomy.decoder.modules():
        if scans_of(module):
            recorder.mixers[module.layer_idx] = paths[module]  # type: ignore[index]
            install(module)
    _register()
    with (
        _implementations(anatomy.model),
        _noting(recorder, anatomy),
        recorder.rotary.watching(anatomy.decoder, paths),
        mixing(recorder),
        torch.no_grad(),
        NotThere(),
    ):
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.zeros((1, ROWS, anatomy.embedding.embedding_dim), dtype=anatomy.model.dtype),
            "position_ids": torch.arange(ROWS)[None],
            anatomy.cache_name: _Cache(recorder),
            "use_cache": True,
        }
        if anatomy.layer_embedding is not None:
            inputs["per_layer_inputs"] = anatomy.decoder.get_per_layer_inputs(torch.zeros((1, ROWS), dtype=torch.long))
        try:
            anatomy.decoder(**inputs)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise _refusal(recorder, anatomy, error) from error
    return _conclude(recorder, anatomy)


def _refusal(recorder: _Recorder, anatomy: Anatomy, error: Exception) -> UnsupportedModel:
    """What the *error* of a run means."""
    if own := _own_caches(anatomy.decoder):
        return _cannot_run(
            recorder.family, f"it keeps its state in a cache of its own class ({', '.join(own)}), not in the one given"
        )
    if isinstance(error, AttributeError) and isinstance(error.obj, _Cache):
        return _cannot_run(
            recorder.family, f"it asks its cache for {error.name!r}, which a cache of pages does not have"
        )
    if recorder.cached.keys() - recorder.attended.keys():
        return bypassing(recorder.family)
    return UnsupportedModel(
        f"{recorder.family!r} as its config says does not run on text alone here "
        f"({type(error).__name__}: {error!s:.200}); correct its config.json, or use another model"
    )


def _own_caches(decoder: torch.nn.Module) -> list[str]:
    """Classes of caches that the forward of *decoder* names and that its family alone has."""
    forward = inspect.unwrap(type(decoder).forward)
    named = {name: forward.__globals__.get(name) for name in forward.__code__.co_names if name.endswith("Cache")}
    return sorted(name for name, cls in named.items() if getattr(cls, "__module__", "") == forward.__module__)


def _cannot_run(family: str, found: str) -> UnsupportedModel:
    return UnsupportedModel(f"{family!r} cannot run: {found}; use another family, or plain transformers")


def bypassing(family: str) -> UnsupportedModel:
    """The error of a model whose attention this engine has no say in."""
    return UnsupportedModel(
        f"{family!r} computes attention inside its own modules and bypasses transformers' attention interface, which "
        "LayerStream runs on: use another family, or plain transformers"
    )


def _conclude(recorder: _Recorder, anatomy: Anatomy) -> Trace:
    kept = recorder.cached.keys() | recorder.attended.keys()
    if not kept and not recorder.states:
        raise _cannot_run(
            recorder.family, "it caches neither keys and values nor states of scans that this version knows"
        )
    paths = _layer_paths(recorder, anatomy)
    if recorder.cached.keys() - recorder.attended.keys():
        raise bypassing(recorder.family)
    numbers = {layer: number for number, layer in enumerate(sorted(recorder.cached))}
    inside = f"{recorder.paths[anatomy.decoder]}."
    lists = frozenset(path for path in recorder.order.keys() - recorder.ran if path.startswith(inside))
    lenders = {path for path in lists if not isinstance(anatomy.model.get_submodule(path), _LISTS)}
    return Trace(
        layers=tuple(_layer(recorder, number, numbers) for number in range(len(paths))),
        order=recorder.order,
        lists=lists,
        mingled=frozenset(path.rpartition(".")[0] for path in lenders),
        top_k=recorder.top_k,
        copies=recorder.copies,
        paths=paths,
        idle=frozenset(
            f"{mixer}.{name}"
            for mixer in recorder.mixers.values()
            for name, _ in anatomy.model.get_submodule(mixer).named_children()
            if f"{mixer}.{name}" not in recorder.order
        ),
    )


def _layer(recorder: _Recorder, number: int, numbers: Mapping[int, int]) -> LayerTrace:
    """What layer *number* does; states have *numbers*.

    Raises:
        UnsupportedModel: it neither attends nor mixes, and its config does not say that it computes row by row.
    """
    layer = recorder.attended.get(number, LayerTrace())
    if layer.path:
        layer = replace(layer, state=numbers[layer.state])
    if layer.kept is not None:
        turn, is_known = recorder.turns[number]
        layer = replace(layer, turn=turn, is_movable=is_known)
    if number in recorder.states:
        shape = StateShape(tuple(recorder.states[number].values()))
        return replace(layer, recurrent=Recurrent(recorder.mixers[number], shape))
    if not layer.path and (kind := recorder.layer_types.get(number, "")) not in _BY_ROW:
        raise _cannot_run(
            recorder.family,
            f"its layer {number} ({kind or 'of no known kind'}) caches nothing and does not attend: {_UNKNOWN_STATE}, "
            "or bypasses transformers' attention interface",
        )
    return layer


def _layer_paths(recorder: _Recorder, anatomy: Anatomy) -> tuple[str, ...]:
    """Paths of the decoder's layers: the list of modules that attention and mixers are in.

    Raises:
        UnsupportedModel: they are in none, so it bypasses what this engine has a say in.
    """
    seen = [layer.path for layer in recorder.attended.values()]
    seen += [recorder.mixers[layer] for layer in recorder.states]
    for path, module in anatomy.decoder.named_modules(prefix=recorder.paths[anatomy.decoder]):
        if isinstance(module, torch.nn.ModuleList) and seen and all(other.startswith(f"{path}.") for other in seen):
            return tuple(f"{path}.{number}" for number in range(len(module)))
    raise bypassing(recorder.family)


class _Cache(PagedCache):
    """Notes what it is given; to transformers it looks as it will in a sweep."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recorder = self._recorder
        if layer_idx in recorder.cached:
            raise UnsupportedModel(
                f"{recorder.family!r} caches twice in layer {layer_idx}, which this version does not keep"
            )
        recorder.cached[layer_idx] = key_states, value_states
        recorder.turns[layer_idx] = recorder.rotary.take(key_states, value_states)
        return key_states, value_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self._check_known(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self._check_known(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        if "recurrent" not in self._recorder.states.get(layer_idx, {}):
            raise _cannot_run(self._recorder.family, _UNKNOWN_STATE)
        return recurrent_states

    def _check_known(self, layer: int, state: int) -> None:
        if layer not in self._recorder.mixers or state:
            raise _cannot_run(self._recorder.family, _UNKNOWN_STATE)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if any(hasattr(module, "layer_idx") for module in self._recorder.running):
            self._recorder.counted.add(layer_idx)
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        reason = next((reason for word, reason in _MECHANISMS.items() if word in name), None)
        if reason is None:
            raise AttributeError(name, name=name, obj=self)
        raise _cannot_run(self._recorder.family, reason)


def _note_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    recorder = _RECORDER.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    if layer < 0:
        raise _cannot_run(
            recorder.family,
            f"layers share a module that attends ({recorder.paths[module]}), and this version needs one for each",
        )
    if unknown := next((name for name in _CHANGING if others.get(name) is not None), None):
        raise UnsupportedModel(f"{recorder.family!r} attends with {unknown}, which this version does not apply")
    own = recorder.cached.get(layer)
    source = next((at for at, kept in recorder.cached.items() if kept[0] is key and kept[1] is value), None)
    if own is not None and source is not None and source != layer:
        raise UnsupportedModel(f"{recorder.family!r} caches one thing in layer {layer} and attends to another")
    if source is None and own is None:
        raise UnsupportedModel(f"{recorder.family!r} attends to what it does not cache, in layer {layer}")
    window, chunk = recorder.locality(attention_mask)
    recorder.attended[layer] = LayerTrace(
        path=recorder.paths[module],
        kept=None if own is None else _shape(*own),
        state=layer if source is None else source,
        window=window,
        chunk=chunk,
        expands=source is None,
        counts=layer in recorder.counted,
    )
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3])), None


def _shape(keys: torch.Tensor, values: torch.Tensor) -> PageShape:
    """Of ``(1, heads, rows, width)``."""
    dtype = str(keys.dtype).removeprefix("torch.")
    return PageShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], dtype)


def _note_experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    recorder = _RECORDER.get()
    recorder.top_k[recorder.paths[module]] = top_k_index.shape[-1]
    return torch.empty_like(hidden_states)


def _register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _note_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, note_mask)
    ExpertsInterface.register(IMPLEMENTATION, _note_experts)


@contextmanager
def _implementations(model: torch.nn.Module) -> Iterator[None]:
    """*model* attends, masks and mixes by what only takes notes."""
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, name, getattr(config, name, None)) for config in configs.values() for name in names]
    for config, name, _ in before:
        setattr(config, name, IMPLEMENTATION)
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


@contextmanager
def _noting(recorder: _Recorder, anatomy: Anatomy) -> Iterator[None]:
    """Modules of the decoder say when they run."""

    def begin(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        parts = recorder.paths[module].split(".")
        for depth in range(len(parts)):  # lists of modules run with the first of them
            recorder.order.setdefault(".".join(parts[: depth + 1]), len(recorder.order))
        recorder.ran.add(recorder.paths[module])
        shape = next((item.shape for item in given if isinstance(item, torch.Tensor)), ())
        if len(shape) == 4 and tuple(shape[1:3]) == (1, ROWS):
            recorder.copies = max(recorder.copies, shape[0])
        recorder.running.append(module)

    def end(*_: Any) -> None:
        recorder.running.pop()

    handles = []
    for module in anatomy.decoder.modules():
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)
        for handle in handles:
            handle.remove()
