"""A prompt, answered by the engine and by plain transformers after the engine's tokens: where they part.

The engine answers first, with every layer's input on record. Plain transformers then walks the same tokens in one run
(:mod:`layerstream.comparing.walk`). If a layer differs, the engine answers once more, with what happens within that
layer on record: its bits are the same again, and so is what is wrong with them.

The engine keeps to its budget; beside it there are one layer's weights of plain transformers, and files for the
records.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch

from layerstream.checkpoint.folder import open_folder
from layerstream.checkpoint.gguf import open_gguf, read_rope_factors
from layerstream.comparing.differences import difference
from layerstream.comparing.judging import (
    TOLERANCES,
    Call,
    Choice,
    Culprit,
    Finding,
    Outcome,
    Tolerance,
    find_culprit,
    first_difference,
    judge,
    suspects,
)
from layerstream.comparing.plain import PlainModel
from layerstream.comparing.recording import Record, Taps
from layerstream.comparing.stations import find_stations
from layerstream.comparing.walk import Walk
from layerstream.comparing.weights import FolderWeights, GgufWeights
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError, LayerStreamError, PromptTooLong, UnsupportedModel
from layerstream.hardware.machine import available_memory_bytes
from layerstream.model.skeleton import Skeleton, load_config
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import locate_model
from layerstream.setup.self_check import step_greedily
from layerstream.text.prompt import Prompt, PromptEncoder

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, and how much of it is."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        findings: of embedding, layers, norm and logits, in order.
        choices: the tokens of the answer.
        culprit: the module to blame, if one differs; ``None`` if the difference was not there a second time.
        texts: of the tokens in *choices*.
    """

    model: str
    dtype: str
    num_prompt_tokens: int
    findings: tuple[Finding, ...]
    choices: tuple[Choice, ...]
    culprit: Culprit | None
    texts: dict[int, str]

    @property
    def tolerance(self) -> Tolerance:
        """What rounding may do."""
        return TOLERANCES[self.dtype]

    @property
    def first(self) -> Finding | None:
        """The first module that differs."""
        return first_difference(self.findings)

    @property
    def outcome(self) -> Outcome:
        """What it came to."""
        return judge(self.findings, self.choices, self.tolerance)


def compare(
    config: EngineConfig,
    prompt: Prompt,
    num_tokens: int,
    *,
    is_raw: bool = False,
    on_progress: OnProgress = lambda what, done, count: None,
) -> Comparison:
    """Answer *prompt* with *num_tokens* tokens, the most probable ones, and lay plain transformers beside it.

    Args:
        is_raw: text is continued as it is; else it goes through the model's chat template, if there is one.

    Raises:
        UnsupportedModel: the model does not run here, or not in plain transformers, or cannot be laid side by side.
        ConfigurationError: a store or guesses, which leave out rows; or too little memory.
        PromptTooLong, CheckpointError: as for any answer.
    """
    parts = assemble(_alone(config), None)
    try:
        with tempfile.TemporaryDirectory(prefix="layerstream-compare-") as folder:
            return _Session(parts, Path(folder), on_progress).compare(
                _encode(parts, prompt, num_tokens, is_raw), num_tokens
            )
    finally:
        parts.close()


def _alone(config: EngineConfig) -> EngineConfig:
    """*config*, with every row computed in every run."""
    if config.draft_model is not None or (config.kv_store is not None and not config.kv_store_is_default):
        raise ConfigurationError(
            "what is compared is computed row by row, with nothing taken from a store and nothing guessed: leave out "
            "kv_store and draft_model"
        )
    return dataclasses.replace(config, kv_store=None, speculation="off")


def _encode(parts: Assembly, prompt: Prompt, num_tokens: int, is_raw: bool) -> list[int]:
    encoder = PromptEncoder(
        parts.tokenizer,
        max_context=parts.context_length,
        vocab_size=parts.plan.facts.vocab_size,
        allow_control_tokens=parts.config.allow_control_tokens,
    )
    if isinstance(prompt, str) and not is_raw and encoder.has_chat_template:
        prompt = [{"role": "user", "content": prompt}]
    ids = encoder.encode(prompt)
    if len(ids) + num_tokens > parts.context_length:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens and the answer is to have {num_tokens}; the context has "
            f"{parts.context_length}: shorten one of them, or give the engine more memory",
            num_tokens=len(ids),
        )
    return ids


class _Session:
    """Both sides of one comparison."""

    def __init__(self, parts: Assembly, folder: Path, on_progress: OnProgress) -> None:
        self._parts = parts
        self._folder = folder
        self._on_progress = on_progress
        self._stations = find_stations(parts.skeleton)
        self._dtype = str(parts.skeleton.dtype).removeprefix("torch.")
        self._tolerance = TOLERANCES[self._dtype]

    def compare(self, ids: list[int], num_tokens: int) -> Comparison:
        """Answer *ids*, and compare."""
        known = len(ids) + num_tokens - 1
        self._check_memory(known)
        record, expected, found = (Record(self._make(name), known) for name in ("engine", "plain", "again"))
        answer, logits = self._answer(ids, num_tokens, record, self._stations.tap)
        walk = Walk(self._open_plain(), self._stations, record, expected, self._tolerance)
        try:
            own, given = walk.run(
                [*ids, *answer[:-1]],
                num_tokens,
                lambda done, count: self._on_progress("plain transformers", done, count),
            )
        except LayerStreamError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"plain transformers does not run this {self._parts.skeleton.config.model_type!r}, so there is nothing "
                f"to compare with: {type(error).__name__}: {error}"
            ) from error
        findings = (*walk.findings, self._of_logits(logits, own, given, len(ids) - 1))
        choices = tuple(_choice(len(ids) + at, token, own[at].float()) for at, token in enumerate(answer))
        culprit = self._find_culprit(findings, walk.returned, (ids, num_tokens), expected, found)
        named = {token for choice in choices for token in (choice.engine, choice.plain)}
        return Comparison(
            model=self._parts.config.model,
            dtype=self._dtype,
            num_prompt_tokens=len(ids),
            findings=findings,
            choices=choices,
            culprit=culprit,
            texts={token: self._parts.tokenizer.decode([token]) for token in named},
        )

    def _answer(
        self, ids: list[int], num_tokens: int, record: Record, tap: Callable[[Taps], None]
    ) -> tuple[list[int], torch.Tensor]:
        """The engine's tokens and logits, with what *tap* says in *record*. No page of an earlier answer is used."""
        self._on_progress("the engine", 0, 1)
        prefixes = self._parts.scheduler.prefixes
        prefixes.evict(len(prefixes))
        with Taps(self._parts.skeleton.model, record).open() as taps:
            tap(taps)
            tokens, logits = step_greedily(self._parts, [ids], num_tokens)
        self._on_progress("the engine", 1, 1)
        return tokens[0], logits[0]

    def _open_plain(self) -> PlainModel:
        skeleton, trusts = self._parts.skeleton, self._parts.config.trust_remote_code
        path = self._parts.config.packed or locate_model(self._parts.config)
        if path.suffix == ".gguf":
            factors = read_rope_factors(open_gguf(path))
            return PlainModel(skeleton.config, skeleton.dtype, GgufWeights(skeleton.sources), rope_factors=factors)
        config = load_config(path, trust_remote_code=trusts)
        is_part = config.get_text_config(decoder=True) is not config
        weights = FolderWeights(open_folder(path), skeleton.embedding_key if is_part else None)
        return PlainModel(skeleton.config, skeleton.dtype, weights, trust_remote_code=trusts)

    def _of_logits(self, logits: torch.Tensor, own: torch.Tensor, given: torch.Tensor, first: int) -> Finding:
        apart = difference(logits, given, self._tolerance)
        row = apart.worst_row
        drifted = float((logits.float() - own.float()).abs().max() / own.float().abs().max())
        return Finding("logits", apart.worst, float(apart.apart[row]), first + row, drifted)

    def _find_culprit(
        self,
        findings: tuple[Finding, ...],
        returned: list[str],
        prompt: tuple[list[int], int],
        expected: Record,
        found: Record,
    ) -> Culprit | None:
        """The module to blame for the first of *findings* that differs."""
        first = first_difference(findings)
        if first is None:
            return None
        if first.module not in self._stations.layers:
            return Culprit(self._stations.head if first.module == "logits" else first.module)
        mixtures = {mixture.experts for mixture in self._stations.mixtures}

        def tap(taps: Taps) -> None:
            for path in returned:
                taps.on_input(path)
                taps.on_output(path)
                if path in mixtures:
                    taps.on_routes(path)

        self._answer(*prompt, found, tap)
        agrees = lambda name: self._agrees(found, expected, name)  # noqa: E731
        inner = [Call(path, agrees(f"{path}:in"), agrees(f"{path}:out")) for path in returned[:-1]]
        layer = Call(first.module, True, agrees(f"{first.module}:out"))
        culprit = find_culprit([*inner, layer])
        if culprit is None or culprit.path not in mixtures:
            return culprit
        return dataclasses.replace(culprit, experts=self._suspects(culprit.path, found, expected))

    def _agrees(self, found: Record, expected: Record, name: str) -> bool | None:
        ours, theirs = found.get(name), expected.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        return difference(ours, theirs, self._tolerance).agrees

    def _suspects(self, experts: str, found: Record, expected: Record) -> tuple[int, ...]:
        routes = found.get(f"{experts}:experts")
        ours, theirs = found.get(f"{experts}:out"), expected.get(f"{experts}:out")
        if routes is None or ours is None or theirs is None:
            return ()
        return suspects(routes.tolist(), (difference(ours, theirs, self._tolerance).excess > 1).tolist())

    def _check_memory(self, num_tokens: int) -> None:
        """Plain transformers has room beside the engine.

        Raises:
            ConfigurationError: it has not.
        """
        skeleton = self._parts.skeleton
        of_modules = [*self._stations.chain, self._stations.embedding, self._stations.head]
        values = max(sum(_num_values(skeleton, key) for key in skeleton.keys_of(path)) for path in of_modules)
        weights = 2 * values * skeleton.dtype.itemsize
        scores = 3 * 4 * skeleton.config.num_attention_heads * num_tokens**2
        if (needed := weights + scores) > (free := available_memory_bytes()):
            raise ConfigurationError(
                f"plain transformers needs {format_size(needed)} beside the engine, {format_size(scores)} of it for "
                f"attention among {num_tokens} tokens, and {format_size(free)} are free: compare a shorter prompt, or "
                "give the engine less memory"
            )

    def _make(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir()
        return path


def _choice(position: int, token: int, logits: torch.Tensor) -> Choice:
    plain = int(logits.argmax())
    gap = float(logits[plain] - logits[token])
    return Choice(position, token, plain, gap, gap / float(logits.abs().max()))


def _num_values(skeleton: Skeleton, key: str) -> int:
    return prod(skeleton.sources[key].shape)
