"""Tries a model's family: a shrunken copy of its config, random weights, here and in plain transformers.

The copy goes through everything that a model goes through here (its files, the plan, row blocks, pages, the store), in
fp32: streamed and resident, each with nothing stored and with what the first run stored. Prompts of several lengths run
in the same sweeps, several row blocks to a sweep, and are longer than every window, chunk and top-k of the copy. The
full model and its copy are also run without weights, and every kind of layer that is in one has to be in the other.

What comes out is a value; whoever asked decides on it. A model that runs and is wrong is worse than one that does not.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerstream.checkpoint.reading import explained
from layerstream.core.sweep import Sweep
from layerstream.errors import BudgetTooSmall, LayerStreamError, UnsupportedModel
from layerstream.model.anatomy import dissect
from layerstream.model.families import check_supported, is_tested
from layerstream.model.skeleton import build_meta, load_config
from layerstream.model.trace import trace
from layerstream.model.traced import LayerTrace, Recurrent, Trace
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import locate_model, plan_facts, spend
from layerstream.setup.shrunken import ORDINARY_IDS, ordinary_steps, shrink
from layerstream.setup.shrunken_model import write_model
from layerstream.setup.stepping import step_greedily
from layerstream.store.config import KVStoreConfig

logger = logging.getLogger(__name__)

TOLERANCE = 2e-3
"""Between log-probabilities. What a family does wrong makes hundreds of times as much; of rounding, those that sharpen
most (Gemma 4 attends without a scale) make a quarter."""
PROMPT_LENGTHS = (5, 150, 37)
"""The short one first: it decodes beside chunks of the long one, in row blocks of its own."""
NEW_TOKENS = 4
MEMORY_STEP = 16 << 10  # bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run of the copy beside plain transformers.

    Attributes:
        mode: how it ran.
        difference: between log-probabilities, at most, over all prompts, steps and tokens.
        is_greedy: whether every token is one that plain transformers would have chosen, to within that tolerance.
        is_repeated: whether logits are those of the run before, bit for bit; for a run from the store.
        row_blocks: in one sweep, at most.
        loaded_tokens: whose KV came from the store.
    """

    mode: str
    difference: float
    is_greedy: bool
    is_repeated: bool
    row_blocks: int
    loaded_tokens: int

    @property
    def agrees(self) -> bool:
        """Whether this run gave what plain transformers gives."""
        return self.difference <= TOLERANCE and self.is_greedy and self.is_repeated  # NaN does not

    @property
    def found(self) -> str:
        """How close it came, in words."""
        is_close = self.difference <= TOLERANCE
        found = [f"log-probabilities {'within' if is_close else 'differ by'} {self.difference:.0e}"]
        if not self.is_greedy:
            found.append("other tokens")
        if not self.is_repeated:
            found.append("other bits than before" if self.loaded_tokens else "nothing came from the store")
        return f"{', '.join(found)}, {_count(self.row_blocks, 'row block')} in a sweep"


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What a check compared, and how far apart it was.

    Attributes:
        family: the model type.
        is_tested: whether the project's own tests compare it.
        layers: the kinds of layers that were compared, in words.
        runs: of the copy.
    """

    family: str
    is_tested: bool
    layers: tuple[str, ...]
    runs: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether every run gave what plain transformers gives."""
        return all(run.agrees for run in self.runs)

    @property
    def difference(self) -> float:
        """The largest of all runs."""
        return float(torch.tensor([run.difference for run in self.runs]).max())  # NaN, if there is one

    @property
    def method(self) -> str:
        """What was done, in words."""
        prompts = ", ".join(map(str, sorted(PROMPT_LENGTHS)))
        return f"{NEW_TOKENS} tokens each after prompts of {prompts} at once, with plain transformers, in fp32"


def check_untested(config: EngineConfig) -> None:
    """Check the family of *config*'s model, unless it is on the tested list.

    Raises:
        UnsupportedModel: as :func:`self_check`, or it gives other logits; says which.
    """
    folder = locate_model(config)
    if folder.suffix == ".gguf":
        return  # there is no config.json to make a copy of; what is read of one is tested by architecture
    if is_tested(load_config(folder, trust_remote_code=config.trust_remote_code)):
        return
    found = self_check(folder, config)
    if not found.agrees:
        worst = next(run for run in found.runs if not run.agrees)
        raise UnsupportedModel(
            f"{found.family!r} is not among the tested families, and a shrunken copy gave other answers than plain "
            f"transformers ({worst.mode}: {worst.found}): it would give wrong answers here; use another family, or "
            "plain transformers"
        )
    logger.warning(
        "%r is not among the tested families; a shrunken copy agreed with plain transformers to %.0e",
        found.family,
        found.difference,
    )


def self_check(folder: Path, config: EngineConfig) -> SelfCheck:
    """Compare a shrunken copy of the model in *folder* with plain transformers; its weights are not looked at.

    Raises:
        UnsupportedModel: the family cannot run, cannot be shrunk or cannot be compared in all that it does; says why.
    """
    if folder.suffix == ".gguf":
        raise UnsupportedModel(
            f"{folder} is a GGUF file, and a check is made of the config.json that it was converted from: check a "
            "folder of that model"
        )
    return check_family(load_config(folder, trust_remote_code=config.trust_remote_code), config)


def check_family(full: Any, config: EngineConfig) -> SelfCheck:
    """As :func:`self_check`, of the model that transformers' config *full* describes, run as *config* says."""
    check_supported(full)
    with explained(f"no {full.model_type!r} can be built as its config says"):
        seen = trace(dissect(build_meta(full, torch.float32, config.trust_remote_code)))
    with tempfile.TemporaryDirectory(prefix="layerstream-self-check-") as name:
        try:
            plain = write_model(shrink(full), Path(name) / "model", trust_remote_code=config.trust_remote_code)
            small = trace(dissect(build_meta(plain.config, torch.float32, config.trust_remote_code)))
            layers = _compared_layers(full.model_type, seen, small)
            runs = _compare(plain, Path(name), config)
        except LayerStreamError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"the self-check of {full.model_type!r} did not run: {type(error).__name__}: {error}; whether this "
                "model would be right here is not known: use another family, or plain transformers"
            ) from error
    return SelfCheck(full.model_type, is_tested(full), layers, runs)


def _compared_layers(family: str, full: Trace, small: Trace) -> tuple[str, ...]:
    """The kinds of layers in the copy.

    Raises:
        UnsupportedModel: they are not those of the full model, or one sees further than the prompts are long.
    """
    missing = {_kind(layer) for layer in full.layers} - {_kind(layer) for layer in small.layers}
    if missing:
        raise UnsupportedModel(
            f"the self-check of {family!r} would leave out a kind of layer ({'; '.join(sorted(missing))}): whether "
            "this model would be right here is not known; use another family, or plain transformers"
        )
    reach = max((layer.window or layer.chunk or 0) for layer in small.layers)
    if reach >= max(PROMPT_LENGTHS):
        raise UnsupportedModel(
            f"the self-check of {family!r} does not reach the end of what a layer sees ({reach} positions): its window "
            "has a name in the config that this version does not know; use another family, or plain transformers"
        )
    return tuple(dict.fromkeys(_words(layer) for layer in small.layers))


def _kind(layer: LayerTrace) -> str:
    """What it does, but for sizes."""
    if not layer.path:
        return "computes row by row" if layer.recurrent is None else _state(layer.recurrent)
    seen = "a window" if layer.window is not None else "a chunk" if layer.chunk is not None else "all positions"
    traits = [f"sees {seen}"]
    if layer.kept is None:
        traits.append("reads what another layer cached")
    if layer.expands:
        traits.append("expands latents")
    if layer.counts:
        traits.append("counts positions")
    if layer.recurrent is not None:
        traits.append(_state(layer.recurrent))
    return ", ".join(traits)


def _state(mixer: Recurrent) -> str:
    kinds = {"conv": "a convolution", "recurrent": "a recurrence"}
    return f"keeps the state of {' and '.join(kinds[part.name] for part in mixer.shape.parts)}"


def _words(layer: LayerTrace) -> str:
    size = layer.window or layer.chunk
    return (
        _kind(layer)
        if size is None
        else _kind(layer).replace("a window", f"a window of {size}").replace("a chunk", f"a chunk of {size}")
    )


def _compare(plain: Any, folder: Path, config: EngineConfig) -> tuple[Comparison, ...]:
    """Runs of the copy that *plain* is, streamed and resident, before and after something is stored."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(ORDINARY_IDS.start, ORDINARY_IDS.stop, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    base = EngineConfig(
        str(folder / "model"),
        device=config.device,
        dtype="float32",
        trust_remote_code=config.trust_remote_code,
        allow_untested=True,
    )
    runs: list[Comparison] = []
    for mode, chosen in (("streamed", _with_least_memory(base)), ("resident", base)):
        store = KVStoreConfig(folder / mode, load="always", min_free_bytes=0, answers=False)
        chosen = dataclasses.replace(chosen, kv_store=store)
        cold = _run(plain, prompts, mode, chosen, None)
        runs += [cold[0], _run(plain, prompts, f"{mode}, from the store", chosen, cold[1])[0]]
    return tuple(runs)


def _run(
    plain: Any, prompts: Seq[list[int]], mode: str, config: EngineConfig, before: list[torch.Tensor] | None
) -> tuple[Comparison, list[torch.Tensor]]:
    """One run, compared with *plain* and with the logits of a run *before*."""
    row_blocks: list[int] = []

    def watch(sweep: Sweep) -> None:
        row_blocks.append(len(sweep.blocks))

    parts = assemble(config, None)
    try:
        assert parts.store is not None
        parts.store.wait_until_open()
        tokens, logits = step_greedily(parts, prompts, NEW_TOKENS, watch=watch, between=parts.store.flush)
        loaded = parts.store.counters.loaded_tokens
        parts.store.flush()
    finally:
        parts.close()
    found = [_distance(plain, *answer) for answer in zip(prompts, tokens, logits, strict=True)]
    is_repeated = before is None or (loaded > 0 and all(map(torch.equal, logits, before)))
    worst = float(torch.tensor([difference for difference, _ in found]).max())
    is_greedy = all(greedy for _, greedy in found)
    return Comparison(mode, worst, is_greedy, is_repeated, max(row_blocks), loaded), logits


def _distance(plain: Any, prompt: list[int], answer: list[int], found: torch.Tensor) -> tuple[float, bool]:
    """Between log-probabilities of *found* and of *plain*; whether *answer* is what *plain* would answer."""
    answer = answer[: ordinary_steps(answer)]
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
    is_greedy = bool((expected.max(-1).values - chosen <= TOLERANCE).all())
    return float((found[: len(answer)].log_softmax(-1) - expected).abs().max()), is_greedy


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _with_least_memory(config: EngineConfig) -> EngineConfig:
    """The least that all prompts run at once with, so that the copy streams as finely as it can beside them."""
    facts = plan_facts(config)[0]
    try:
        spend(dataclasses.replace(config, memory_bytes=1), facts)
    except BudgetTooSmall as error:
        enough = dataclasses.replace(config, memory_bytes=error.required_bytes)
        while (plan := spend(enough, facts)).streams and plan.max_sequences < len(PROMPT_LENGTHS):
            enough = dataclasses.replace(enough, memory_bytes=plan.budget_bytes + MEMORY_STEP)
        return enough
    return config
