"""AirLLM's programs with only the import changed: ``from layerstream import AutoModel``.

A translation and no engine of its own: tensors to prompts, keyword arguments to :class:`SamplingParams`, completions to
the padded tensor that transformers' ``generate`` returns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput  # pyright: ignore[reportPrivateImportUsage]

from layerstream.api.completion import Completion
from layerstream.api.params import SamplingParams
from layerstream.engine import LayerStream
from layerstream.errors import ConfigurationError, EmptyPrompt, PromptError

_COMPRESSIONS = {None: None, "4bit": "nf4", "8bit": "int8"}
_NOT_NEEDED = {
    "max_seq_len": "the context is as long as the model's",
    "layer_shards_saving_path": "the checkpoint is not rewritten",
    "delete_original": "the checkpoint is not rewritten",
    "prefetching": "weights are always read ahead",
    "profiling_mode": "progress= and engine.stats() tell",
}
_NO_EFFECT = frozenset({"use_cache", "synced_gpus"})
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class AutoModel:
    """A model as AirLLM's programs hold it. Make it with :meth:`from_pretrained`.

    Attributes:
        engine: the :class:`LayerStream` that does the work.
    """

    def __init__(self, engine: LayerStream) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        compression: str | None = None,
        device: Any = "auto",
        dtype: torch.dtype | str = "auto",
        hf_token: str | None = None,
        **options: Any,
    ) -> AutoModel:
        """Open a model: a folder, a hub id, or ``"demo"``.

        Args:
            compression: ``"4bit"`` or ``"8bit"``: converted once, as ``quantization="nf4"`` and ``"int8"``.
            hf_token: the hub's token.
            options: options of :class:`LayerStream` (``memory="3GiB"``, ``revision=…``). Those of AirLLM that are not
                needed here are taken, with a warning.

        Raises:
            ConfigurationError: an option that would change the result cannot be honoured. Other errors: as LayerStream.
            TypeError: an option that neither AirLLM nor LayerStream has.
        """
        if compression not in _COMPRESSIONS:
            raise ConfigurationError(f"compression is {compression!r}; expected '4bit', '8bit' or None")
        for name in [name for name in options if name in _NOT_NEEDED]:
            if options.pop(name) is not None:
                warnings.warn(f"{name} is not needed: {_NOT_NEEDED[name]}", stacklevel=2)
        engine = LayerStream(
            os.fspath(pretrained_model_name_or_path),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            quantization=_COMPRESSIONS[compression],
            **({} if hf_token is None else {"token": hf_token}),
            **options,
        )
        return cls(engine)

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.engine.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs may lie; they are read as numbers, so anywhere will do."""
        return torch.device("cpu")

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def generate(
        self,
        input_ids: torch.Tensor | Mapping[str, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """Continue every row of *input_ids*; all rows share every sweep.

        Args:
            input_ids: ``(batch, prompt)``, padded left or right; or what the tokenizer returned.
            attention_mask: ``(batch, prompt)``, 0 where a row is padded; without it, pad tokens at a row's ends are
                taken for padding, as transformers does.
            max_new_tokens: 20 unless *max_length* says how long a row may become with its prompt.
            do_sample: None: as ``generation_config.json`` says. ``torch.manual_seed`` makes draws repeatable.
            options: ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``.

        Returns:
            ``(batch * num_return_sequences, prompt + new)``, int64: the prompts as given, the new tokens, then padding;
            in an object as its ``sequences`` with *return_dict_in_generate*.

        Raises:
            ConfigurationError: an option that would change the result and is not supported (beams, for example).
        """
        if isinstance(input_ids, Mapping):
            attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            input_ids = input_ids["input_ids"]
        ids = _as_rows(input_ids)
        pad = self._pad_token_id(pad_token_id)
        kept = _kept(ids, attention_mask, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        params = SamplingParams(
            max_tokens=_max_tokens(max_new_tokens, max_length, ids.shape[1]),
            n=num_return_sequences,
            stop_token_ids=_as_list(eos_token_id),
            **self._sampling(do_sample, options),
        )
        prompts = [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]
        if not all(prompts):
            raise EmptyPrompt("a row of input_ids has no tokens beside padding; there is nothing to continue")
        completions = self.engine.generate(prompts, params)
        sequences = _stack(ids.repeat_interleave(num_return_sequences, 0), completions, pad)
        return GenerateDecoderOnlyOutput(sequences=sequences) if return_dict_in_generate else sequences  # pyright: ignore[reportArgumentType]

    def _sampling(self, do_sample: bool | None, options: dict[str, Any]) -> dict[str, Any]:
        """transformers' sampling arguments as those of SamplingParams."""
        chosen = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
        _refuse(options)
        defaults = self.engine.sampling_defaults
        if do_sample is None:
            do_sample = not defaults.is_greedy
        if not do_sample:
            return {"temperature": 0.0, **{name: chosen[name] for name in ("repetition_penalty",) if name in chosen}}
        if defaults.is_greedy:
            chosen.setdefault("temperature", 1.0)
        return {**chosen, "seed": int(torch.randint(2**31, ()))}

    def _pad_token_id(self, given: int | None) -> int:
        for token_id in (given, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        return 0


def _refuse(options: dict[str, Any]) -> None:
    """Options that change nothing here are fine; others must not be dropped in silence."""
    wrong = {name: value for name, value in options.items() if name not in _NO_EFFECT and value not in (None, False)}
    if wrong.get("num_beams") == 1:
        del wrong["num_beams"]
    if wrong:
        named = ", ".join(f"{name}={value!r:.40}" for name, value in wrong.items())
        raise ConfigurationError(f"generate() does not support {named}; leave it out, or use LayerStream.generate")


def _as_rows(input_ids: torch.Tensor) -> torch.Tensor:
    """``(batch, prompt)`` of int64 on the CPU."""
    ids = torch.as_tensor(input_ids).cpu().long()
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.numel() == 0:
        raise PromptError(f"input_ids has shape {tuple(ids.shape)}; expected (batch, prompt) with at least one token")
    return ids


def _kept(
    ids: torch.Tensor, attention_mask: torch.Tensor | None, pad: int | None, eos: int | list[int] | None
) -> torch.Tensor:
    """``(batch, prompt)`` of bool: what is no padding."""
    if attention_mask is not None:
        kept = torch.as_tensor(attention_mask).cpu().reshape(ids.shape).bool()
    elif pad is None or pad in _as_list(eos):  # a row may end in a real EOS
        return torch.ones_like(ids, dtype=torch.bool)
    else:
        kept = ids != pad
    from_left, from_right = kept.cumsum(1) > 0, kept.flip(1).cumsum(1).flip(1) > 0
    return kept if attention_mask is not None else from_left & from_right


def _max_tokens(max_new_tokens: int | None, max_length: int | None, num_prompt_tokens: int) -> int:
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length is None:
        return 20
    if max_length <= num_prompt_tokens:
        raise ConfigurationError(f"max_length is {max_length}; the prompt has {num_prompt_tokens} tokens already")
    return max_length - num_prompt_tokens


def _stack(prompts: torch.Tensor, completions: list[Completion], pad: int) -> torch.Tensor:
    """Prompts ``(rows, prompt)`` with the completions behind them, padded right."""
    width = max(len(completion.token_ids) for completion in completions)
    new = torch.full((len(completions), width), pad, dtype=torch.long)
    for row, completion in zip(new, completions, strict=True):
        row[: len(completion.token_ids)] = torch.tensor(completion.token_ids, dtype=torch.long)
    return torch.cat([prompts, new], 1)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
