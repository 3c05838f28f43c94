"""Plain transformers in bounded memory: its own modules and forward, the weights of one module after the other.

Nothing of transformers is changed, but that towers for images and sound are left out: the model is built from the
config with eager attention and eager experts, hooks load the weights of a decoder layer before it runs and let them go
after it. transformers' own loader puts them there: it renames, stacks experts, ties, and keeps in fp32 what it keeps in
fp32. There is no cache: all tokens run at once.

What it shares with the engine: the config as transformers read it; which files count, how quantised matrices are
decoded, and the names in GGUF files (:mod:`layerstream.comparing.weights`); torch's kernels, where both happen to call
the same. What it does not: the plan, reading, streaming, the mapping of names to parameters, row blocks, attention,
pages of KV, routing and experts, kernels for quantised weights, the head in slices, devices.

Memory: the weights of the largest layer, embedding or head, twice while they are loaded, and attention scores of
``tokens × tokens`` for each head of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from layerstream.comparing.weights import Weights
from layerstream.errors import InvalidHeader, MissingTensor
from layerstream.model.anatomy import build_own, dissect
from layerstream.model.hooks import named_holders
from layerstream.model.quiet import no_progress_bars

Watch: TypeAlias = Callable[[str, torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""Told of a module that has run, its weights still there: path, module, arguments, what it gave."""


class PlainModel:
    """A causal language model of transformers whose weights come and go.

    Args:
        config: of the model, as transformers read it.
        weights: the values of its checkpoint.

    Attributes:
        model: on the meta device, but for what is running.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        weights: Weights,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = build_own(
            config,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=dtype,
        )
        self._parts = dissect(self.model)
        self._weights = weights
        self._holders = {key: (holder, name) for key, holder, name in named_holders(self.model, "")}
        self._config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=[] if weights.are_parameters else _conversions(self.model),
        )
        self._stored = self._find_stored()

    def run(
        self,
        token_ids: Sequence[int],
        watched: Sequence[str],
        watch: Watch,
        replace: Callable[[torch.Tensor], torch.Tensor],
        num_logits: int,
    ) -> torch.Tensor:
        """Logits ``(batch, num_logits, vocabulary)`` of the last rows.

        Args:
            watched: paths of the modules with weights between embedding and head, each of which *watch* is told of.
            replace: makes the head's input, ``(batch, tokens, hidden)``, of the decoder's output, where batch is 1.
        """
        parts, paths = self._parts, {module: path for path, module in self.model.named_modules()}
        ends = [paths[part] for part in (parts.embedding, parts.layer_embedding, parts.head) if part is not None]
        handles = [parts.decoder.register_forward_hook(lambda module, given, output: _with(output, replace))]
        for path in (*ends, *watched):
            handles.extend(self._come_and_go(path, watch if path in watched else None))
        try:
            with torch.inference_mode(), no_progress_bars():
                ids = torch.tensor([list(token_ids)])
                given = {"inputs_embeds": parts.embedding(ids)}
                if parts.layer_embedding is not None:
                    given["per_layer_inputs"] = parts.decoder.get_per_layer_inputs(ids)
                return parts.causal(**given, use_cache=False, logits_to_keep=num_logits).logits
        finally:
            for handle in handles:
                handle.remove()

    def _come_and_go(self, path: str, watch: Watch | None) -> Iterator[Any]:
        """Hooks that have the weights of *path* there while it runs, and until *watch* has seen it."""
        module = self.model.get_submodule(path)
        meta: list[tuple[dict[str, Any], str, Any]] = []

        def come(*_: Any) -> None:
            meta.extend(self._load(path))

        def go(*_: Any) -> None:
            for holder, name, value in meta:
                holder[name] = value
            meta.clear()

        def show(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if watch is not None:
                watch(path, module, args, kwargs, output)

        yield module.register_forward_pre_hook(come)
        yield module.register_forward_hook(show, with_kwargs=True)
        yield module.register_forward_hook(go, always_call=True)

    def _load(self, path: str) -> list[tuple[dict[str, Any], str, Any]]:
        """Bring the weights of *path*; what was in their place.

        Raises:
            MissingTensor, InvalidHeader: transformers finds nothing for one of them, or another shape.
        """
        holders = self._holders
        wanted = [key for key in holders if key.startswith(f"{path}.")]
        tied = {key: self._tied_with(key) for key in wanted if key not in self._stored}
        needed = {*wanted, *(other for other in tied.values() if other is not None)}
        before = [(*holders[key], holders[key][0][holders[key][1]]) for key in needed]
        names = {name for key in needed for name in self._stored.get(key, ())}
        found, _ = convert_and_load_state_dict_in_model(self.model, self._weights.read(names), self._config)
        for key, other in tied.items():
            if other is not None:
                (holder, name), (source, stored) = holders[key], holders[other]
                holder[name] = source[stored]
        missing = found.missing_keys & {key for key in wanted if tied.get(key) is None}
        if missing:
            raise MissingTensor(f"plain transformers finds nothing for {sorted(missing)[0]!r} in the checkpoint")
        if found.mismatched_keys or found.conversion_errors:
            wrong = next(iter([*found.mismatched_keys, *found.conversion_errors.items()]))
            raise InvalidHeader(f"plain transformers cannot load what belongs to {path!r}: {wrong!s:.400}")
        return before

    def _tied_with(self, key: str) -> str | None:
        """The parameter that is stored for *key*, which is not stored itself."""
        ties: Mapping[str, str] = self.model.all_tied_weights_keys
        others = [source for target, source in ties.items() if target == key]
        others += [target for target, source in ties.items() if source == key]
        return next((other for other in others if other in self._stored), None)

    def _find_stored(self) -> dict[str, list[str]]:
        """The names in the checkpoint of what each parameter is made of, by transformers' own renaming.

        Where several parameters are made of one tensor, it is noted for all that a converter names.
        """
        if self._weights.are_parameters:
            return {name: [name] for name in self._weights.names}
        meta = self.model.state_dict()
        mapping = self._config.weight_mapping or []
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, found = self.model.base_model_prefix, {}
        for name in self._weights.names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in meta and name in meta:
                target, pattern = rename_source_key(name, [], [], prefix, meta)
            patterns = [] if pattern is None else by_pattern[pattern].target_patterns
            for made in {target, *(target.replace(patterns[0], other) for other in patterns)}:
                if made in meta:
                    found.setdefault(made, []).append(name)
        return found


def _conversions(model: Any) -> list[WeightConverter | WeightRenaming]:
    """How stored names and layouts become parameters."""
    return [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightConverter | WeightRenaming)]


def _with(output: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    output.last_hidden_state = replace(output.last_hidden_state)
    return output
