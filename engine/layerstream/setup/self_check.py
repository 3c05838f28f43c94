"""Tries a family that is not on the tested list: a shrunken copy of its config, random weights, both ways.

The copy goes through everything that a model goes through here (its files, the plan, row blocks, pages, streaming) and
through plain transformers, in fp32, with several sequences and a prompt of more than one chunk. If the logits differ
anywhere, the family is refused: a model that runs and is wrong is worse than one that does not run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import transformers

from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.errors import BudgetTooSmall, LayerStreamError, UnsupportedModel
from layerstream.model.families import check_supported, is_tested
from layerstream.model.skeleton import load_config
from layerstream.scheduling.composing import Drafting
from layerstream.scheduling.verify import verify
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import locate_model, plan_model
from layerstream.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest logit
PROMPT_LENGTHS = (150, 5, 37)
NEW_TOKENS = 3
_VOCAB_SIZE = 512
_SMALLER: dict[str, int] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def check_untested(config: EngineConfig) -> None:
    """Compare the family of *config*'s model with plain transformers, unless it is on the tested list.

    Raises:
        UnsupportedModel: it cannot be built small, does not run, or gives other logits; says which.
    """
    folder = locate_model(config)
    if folder.suffix == ".gguf":
        return  # all architectures that are read from GGUF are tested
    whole = load_config(folder, trust_remote_code=config.trust_remote_code)
    if is_tested(whole):
        return
    check_supported(whole, allow_untested=True)
    full = whole.get_text_config(decoder=True)
    with tempfile.TemporaryDirectory(prefix="layerstream-self-check-") as name:
        copied = Path(name)
        try:
            plain = _write_small(full, copied, config.trust_remote_code)
            load_tokenizer(folder, config.trust_remote_code).save_pretrained(copied)
            difference = _largest_difference(plain, copied, config.trust_remote_code)
        except LayerStreamError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"{full.model_type!r} is not among the tested families, and its self-check did not run: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not difference <= TOLERANCE:  # NaN as well
        raise UnsupportedModel(
            f"{full.model_type!r} is not among the tested families, and its self-check gave other logits than plain "
            f"transformers (by {difference:.1e} of the largest): it would give wrong answers"
        )
    logger.warning(
        "%r is not among the tested families; a shrunken copy agreed with plain transformers to %.0e",
        full.model_type,
        difference,
    )


def step_greedily(
    parts: Assembly, prompts: Seq[Seq[int]], num_tokens: int, drafting: Drafting | None = None
) -> tuple[list[list[int]], list[Any]]:
    """Answer *prompts* in shared sweeps, on this thread, with guesses of *drafting*; no text, no stop.

    Returns:
        ``num_tokens`` token ids per prompt, and the logits ``(num_tokens, vocabulary)`` that each was chosen from.
    """
    params = SamplingParams(max_tokens=num_tokens)
    sequences = [Sequence(index, list(ids), len(ids), params) for index, ids in enumerate(prompts)]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for sequence in sequences:
        parts.scheduler.add(sequence)
    while parts.scheduler.num_waiting or parts.scheduler.num_running:
        sweep = parts.steward.schedule(drafting) if drafting else parts.steward.schedule()
        for _, error in parts.scheduler.take_failed():
            raise error
        if sweep is None:  # a page is being stored
            time.sleep(0.001)
            continue
        rows = parts.step.run(sweep)
        parts.scheduler.check_integrity()
        if rows is None:
            continue
        for sequence, own in sweep.logit_rows():

            def draw(node: int, sequence: Sequence = sequence, rows: list[torch.Tensor] = [*rows[own]]):  # noqa: B006
                row = rows[node + 1].clone()
                logits[sequence.sequence_id].append(row)
                sequence.token_ids.append(int(row.argmax()))
                return sequence.token_ids[-1:], sequence.num_output_tokens < num_tokens

            right = verify(sweep.drafts.get(sequence), draw)
            if sequence.num_output_tokens == num_tokens:
                parts.steward.remove(sequence)
            else:
                parts.step.accept(sequence, right)
    return [sequence.output_ids for sequence in sequences], [torch.stack(rows) for rows in logits]


def _largest_difference(plain: Any, folder: Path, trust_remote_code: bool) -> float:
    """Between the logits here and there, relative to the largest, over all prompts and steps."""
    config = EngineConfig(str(folder), dtype="float32", trust_remote_code=trust_remote_code, allow_untested=True)
    parts = assemble(_with_least_memory(config), None)
    try:
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, _VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        tokens, logits = step_greedily(parts, prompts, NEW_TOKENS)
    finally:
        parts.close()
    worst = 0.0
    for prompt, answer, found in zip(prompts, tokens, logits, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        difference = float((found - expected).abs().max() / expected.abs().max())
        worst = max(worst, difference) if difference == difference else float("nan")
    return worst


def _with_least_memory(config: EngineConfig) -> EngineConfig:
    """So that the copy streams as finely as it can."""
    try:
        plan_model(dataclasses.replace(config, memory_bytes=1))
    except BudgetTooSmall as error:
        return dataclasses.replace(config, memory_bytes=error.required_bytes)
    return config


def _write_small(full: Any, folder: Path, trust_remote_code: bool) -> Any:
    """A small random model of *full*'s family, saved to *folder*; persistent buffers random too."""
    config = _shrink(full)
    torch_seed = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        ).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    offset = 1.0 if "norm" in name and tensor.dim() == 1 and "bias" not in name else 0.0
                    tensor.copy_(torch.randn(tensor.shape) * 0.15 + offset)
    finally:
        torch.random.set_rng_state(torch_seed)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def _shrink(full: Any) -> Any:
    """*full* with fewer and smaller layers; everything else (RoPE, windows, biases, scalings) as it is."""
    config = copy.deepcopy(full)
    heads = getattr(full, "num_attention_heads", 4)
    for name, most in _SMALLER.items():
        value = getattr(full, name, None)
        if isinstance(value, int):
            with contextlib.suppress(AttributeError):  # a property that others determine
                setattr(config, name, min(value, most))
    if isinstance(kv_heads := getattr(full, "num_key_value_heads", None), int):
        config.num_key_value_heads = 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    if getattr(full, "head_dim", None) is None and hasattr(config, "hidden_size"):
        config.hidden_size = 16 * config.num_attention_heads
    if layer_types := getattr(full, "layer_types", None):
        kinds = list(dict.fromkeys(layer_types))  # every kind of layer at least once
        config.layer_types = (kinds + list(layer_types))[: max(len(kinds), config.num_hidden_layers)]
        config.num_hidden_layers = len(config.layer_types)
    config.vocab_size = _VOCAB_SIZE
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return config
