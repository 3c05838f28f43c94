"""Every tested family against plain transformers: greedy tokens and logits, fp32, on every step.

Three prompts of different lengths run in the same sweeps; the longest is computed in several chunks over several
sweeps, and is longer than every window and attention chunk among the families.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerstream import planner
from layerstream.assembly import EngineConfig, assemble, model_facts
from layerstream.model.families import TESTED
from layerstream.model.skeleton import build_skeleton
from layerstream.params import SamplingParams
from layerstream.sequence import Sequence
from layerstream.streaming import residency
from tests.models import FAMILIES, VOCAB_SIZE, make_model

PROMPT_LENGTHS = (150, 5, 67)
NEW_TOKENS = 6
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and stream models of a few hundred kilobytes as if they were large."""
    monkeypatch.setattr(residency, "PIN_BELOW", 0)
    monkeypatch.setattr(residency, "UNIT_OVERHEAD", 4 * residency.PAGE)
    monkeypatch.setattr(planner, "FINEST_UNIT_BYTES", 12 * 1024)
    monkeypatch.setattr(planner, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(planner, "MIN_KV_TOKENS", 512)
    monkeypatch.setattr(planner, "MAX_SWEEP_TOKENS", 96)


def budget_for(folder: Path, mode: str) -> int:
    """A budget under which the model is resident, streams by layers, or is cut as fine as it gets."""
    facts = model_facts(build_skeleton(folder, dtype="float32"), 1024)
    least = planner._least_bytes(facts, planner.MAX_SWEEP_TOKENS)
    if mode == "resident":
        return planner.comfortable_bytes(facts)
    if mode == "cut":
        return least + 2048
    kv_bytes = planner.MIN_KV_TOKENS * facts.kv_token_bytes
    resident = planner._activation_bytes(facts, planner.MAX_SWEEP_TOKENS) + facts.compute_bytes + kv_bytes
    return min(least + facts.compute_bytes // 2, resident - 1)


def run(folder: Path, budget: int, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[torch.Tensor]], bool]:
    """Greedy tokens and the logits of every step, per prompt; and whether weights streamed."""
    parts = assemble(EngineConfig(str(folder), memory_bytes=budget, dtype="float32"), None)
    try:
        params = SamplingParams(max_tokens=NEW_TOKENS)
        sequences = [Sequence(i, list(ids), len(ids), params) for i, ids in enumerate(prompts)]
        logits: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(prompts))}
        for sequence in sequences:
            parts.scheduler.add(sequence)
        while (sweep := parts.scheduler.schedule()) is not None:
            rows = parts.runner.run(sweep).clone()
            parts.scheduler.check_integrity()
            for _, span in sweep.spans():
                span.sequence.num_computed = span.stop
            for sequence, row in zip(sweep.sampled, rows, strict=True):
                logits[sequence.sequence_id].append(row)
                sequence.token_ids.append(int(row.argmax()))
                if sequence.num_output_tokens == NEW_TOKENS:
                    parts.scheduler.remove(sequence)
        return [sequence.output_ids for sequence in sequences], list(logits.values()), parts.plan.streams
    finally:
        parts.reader.close()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@pytest.mark.parametrize("mode", ["resident", "layers", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_transformers(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_model(family, tmp_path)
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if mode == "cut" and family in {"llama4-text", "deepseek-v3"}:
        pytest.skip("attention must fit the ring as a whole where only one sequence is in a row block")
    tokens, logits, streams = run(tmp_path, budget_for(tmp_path, mode), prompts())
    assert streams == (mode != "resident")
    for prompt, produced, steps in zip(prompts(), tokens, logits, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + produced]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        difference = (torch.stack(steps) - expected).abs().max() / expected.abs().max()
        assert difference <= TOLERANCE, f"logits differ by {difference:.2e}"
        assert produced == expected.argmax(-1).tolist()


def test_every_tested_family_is_compared(tmp_path: Path) -> None:
    import transformers

    compared = {getattr(transformers, f"{prefix}Config").model_type for prefix, _ in FAMILIES.values()}
    assert compared == TESTED
