"""What an engine says of the states of recurrent layers."""

from __future__ import annotations

from pathlib import Path

from layerstream import LayerStream, SamplingParams

from tests.harness import add_tokenizer
from tests.models import make_model

CHUNK = 32
PAGES = 2
PROMPT = [5 + at % 200 for at in range(PAGES * CHUNK + 7)]
STATE_BYTES = 2 * 64 * 2 * 4
"""Of two convolutions of 64 channels, which see two columns before their own, in fp32."""


def test_slots_are_counted_as_they_are_held(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("lfm2", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with LayerStream(tmp_path, kv_store=None, chunk_tokens=CHUNK, progress=False) as engine:
        idle = engine.stats().states
        assert idle is not None
        assert idle.num_slots == engine.plan.num_slots
        assert (idle.slot_bytes, idle.used_slots, idle.snapshots) == (STATE_BYTES, 0, 0)
        running = engine.submit(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
        next(iter(running))
        held = engine.stats().states
        assert held is not None
        assert held.used_slots > held.snapshots > 0, "the sequence's own beside those"
        running.cancel()
        engine.generate([PROMPT], SamplingParams(max_tokens=2, ignore_eos=True))
        left = engine.stats().states
        assert left is not None
        assert left.used_slots == left.snapshots == PAGES


def test_a_model_without_recurrent_layers_has_no_states() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        assert engine.stats().states is None
