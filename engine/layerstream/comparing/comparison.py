"""A prompt, answered by the engine and by plain transformers after the engine's tokens: where they part.

The engine answers first, with every layer's input on record. Plain transformers then walks the same tokens in one run
(:mod:`layerstream.comparing.walk`). If a layer differs, the engine answers once more, with what happens within that
layer on record (:mod:`layerstream.comparing.blame`).

The engine keeps to its budget; beside it there are one layer's weights of plain transformers, and files for the
records.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch

from layerstream.checkpoint.folder import open_folder
from layerstream.comparing.answering import answer
from layerstream.comparing.blame import find_culprit_inside
from layerstream.comparing.differences import difference
from layerstream.comparing.judging import (
    TOLERANCES,
    Choice,
    Culprit,
    Finding,
    Outcome,
    Tolerance,
    first_difference,
    judge,
)
from layerstream.comparing.plain import PlainModel
from layerstream.comparing.recording import Record
from layerstream.comparing.stations import Stations, find_stations
from layerstream.comparing.walk import Walk
from layerstream.comparing.weights import FolderWeights, GgufWeights
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError, LayerStreamError, PromptTooLong, StorageFull, UnsupportedModel
from layerstream.hardware.machine import available_memory_bytes
from layerstream.model.skeleton import Skeleton, load_config
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import locate_model
from layerstream.text.prompt import Prompt, PromptEncoder

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, and how much of it is."""

RECORDED_INSIDE = 32  # times the width of the model: what the modules of one layer return


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
        ids = _encode(parts, prompt, num_tokens, is_raw)
        with tempfile.TemporaryDirectory(prefix="layerstream-compare-") as folder:
            return _compare(parts, ids, num_tokens, Path(folder), on_progress)
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


def _compare(parts: Assembly, ids: list[int], num_tokens: int, folder: Path, on_progress: OnProgress) -> Comparison:
    stations, dtype = find_stations(parts.skeleton), str(parts.skeleton.dtype).removeprefix("torch.")
    known, tolerance = len(ids) + num_tokens - 1, TOLERANCES[dtype]
    _check_memory(parts.skeleton, stations, known)
    _check_disk(folder, parts.skeleton, stations, known)
    record, inside, again = (Record(folder / name, known) for name in ("engine", "plain", "again"))
    on_progress("the engine", 0, 1)
    tokens, logits = answer(parts, ids, num_tokens, record, stations.tap)
    on_progress("the engine", 1, 1)
    with _explained(parts.skeleton.config.model_type):
        walk = Walk(_open_plain(parts), stations, record, inside, tolerance)
        own, aside = walk.run(
            [*ids, *tokens[:-1]], num_tokens, lambda done, count: on_progress("plain transformers", done, count)
        )
    findings = (*walk.findings, _of_logits(logits, own, aside, len(ids) - 1, tolerance))
    choices = tuple(_choice(len(ids) + at, token, own[at].float()) for at, token in enumerate(tokens))
    first, culprit = first_difference(findings), None
    if first is not None and first.module not in stations.layers:
        culprit = Culprit(stations.head if first.module == "logits" else first.module)
    elif first is not None:
        on_progress("the engine, once more", 0, 1)
        answer(parts, ids, num_tokens, again, lambda taps: stations.tap_inside(taps, walk.returned))
        culprit = find_culprit_inside(first, stations, walk.returned, again, inside, tolerance)
        on_progress("the engine, once more", 1, 1)
    named = {token for choice in choices for token in (choice.engine, choice.plain)}
    return Comparison(
        model=parts.config.model,
        dtype=dtype,
        num_prompt_tokens=len(ids),
        findings=findings,
        choices=choices,
        culprit=culprit,
        texts={token: parts.tokenizer.decode([token]) for token in named},
    )


@contextmanager
def _explained(family: str) -> Iterator[None]:
    """What plain transformers dies of, as ours."""
    try:
        yield
    except LayerStreamError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"plain transformers does not run this {family!r}, so there is nothing to compare with: "
            f"{type(error).__name__}: {error}"
        ) from error


def _open_plain(parts: Assembly) -> PlainModel:
    skeleton, trusts = parts.skeleton, parts.config.trust_remote_code
    path = parts.config.packed or locate_model(parts.config)
    if path.suffix == ".gguf":
        return PlainModel(skeleton.config, skeleton.dtype, GgufWeights(skeleton.sources))
    config = load_config(path, trust_remote_code=trusts)
    return PlainModel(config, skeleton.dtype, FolderWeights(open_folder(path)), trust_remote_code=trusts)


def _of_logits(
    logits: torch.Tensor, own: torch.Tensor, aside: torch.Tensor, first: int, tolerance: Tolerance
) -> Finding:
    """Of the engine's *logits* from those of plain transformers' head on what the engine's was given, *aside*."""
    apart = difference(logits, aside, tolerance)
    row = apart.worst_row
    drifted = float((logits.float() - own.float()).abs().max() / own.float().abs().max())
    return Finding("logits", apart.worst, float(apart.apart[row]), first + row, drifted)


def _check_memory(skeleton: Skeleton, stations: Stations, num_tokens: int) -> None:
    """Plain transformers has room beside the engine.

    Raises:
        ConfigurationError: it has not.
    """
    modules = (*stations.chain, stations.embedding, stations.head)
    values = max(sum(prod(skeleton.sources[key].shape) for key in skeleton.keys_of(path)) for path in modules)
    weights = 2 * values * skeleton.dtype.itemsize
    scores = 3 * 4 * skeleton.config.num_attention_heads * num_tokens**2
    if (needed := weights + scores) > (free := available_memory_bytes()):
        raise ConfigurationError(
            f"plain transformers needs {format_size(needed)} beside the engine, {format_size(scores)} of it for "
            f"attention among {num_tokens} tokens, and {format_size(free)} are free: compare a shorter prompt, or give "
            "the engine less memory"
        )


def _check_disk(folder: Path, skeleton: Skeleton, stations: Stations, num_tokens: int) -> None:
    """What is recorded has room in *folder*: the inputs of all layers, and what happens within one of them.

    Raises:
        StorageFull: it has not; a record that finds the disk full would end the process.
    """
    width = skeleton.config.hidden_size * skeleton.dtype.itemsize
    needed = (len(stations.chain) + 2 * RECORDED_INSIDE) * num_tokens * width
    if needed > (free := shutil.disk_usage(folder).free):
        raise StorageFull(
            f"the record of {num_tokens} tokens takes up to {format_size(needed)}, and {folder.parent} has "
            f"{format_size(free)} free: compare a shorter prompt, or have TMPDIR name a folder on a larger disk"
        )


def _choice(position: int, token: int, logits: torch.Tensor) -> Choice:
    plain = int(logits.argmax())
    gap = float(logits[plain] - logits[token])
    return Choice(position, token, plain, gap, gap / float(logits.abs().max()))
