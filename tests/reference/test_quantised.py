"""Quantised folders stream as they lie: logits and greedy tokens of plain transformers with the same weights, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers

from tests.crossing import by_turns
from tests.harness import STREAMING, add_tokenizer, assert_equals, config_for, draw_prompt, run_greedily
from tests.models import make_model
from tests.quantised import PACKERS, write_bitsandbytes, write_quantised

TOLERANCE = 1e-4  # of the largest logit
WHOLE_BLOCKS = {"intermediate_size": 128}  # bitsandbytes' CPU kernel decodes rows of part of a block wrongly (0.50)
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-mixed": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "llm_int8_skip_modules": ["lm_head", "down_proj"],
    },
    "nf4-head": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "llm_int8_skip_modules": [],
    },
}


MODES = (("cut",), ("resident", "tight", "layers"), ("device-resident", "device-disk"))


def _compare(folder: Path, reference: Any, mode: str, tokenizer_folder: Path) -> None:
    add_tokenizer(folder, tokenizer_folder)
    prompts = [draw_prompt(length) for length in (70, 5)]
    run = run_greedily(config_for(folder, mode), prompts)
    assert run.streams == (mode in STREAMING)
    assert_equals(run, reference, prompts, TOLERANCE)


@pytest.mark.parametrize(("kind", "mode"), by_turns(PACKERS, *MODES))
def test_equals_the_decoded_weights(kind: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    reference = make_model("llama", tmp_path)
    pack, quantisation = PACKERS[kind]
    write_quantised(tmp_path, reference, pack, quantisation, leave="layers.1.mlp.up_proj")
    _compare(tmp_path, reference, mode, tokenizer_folder)


@pytest.mark.parametrize(("kind", "mode"), by_turns(BITSANDBYTES, *MODES))
def test_equals_transformers_with_bitsandbytes(kind: str, mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Its weights are those that transformers loads; its kernel for the CPU then rounds its inputs to bfloat16."""
    reference = make_model("llama", tmp_path / "plain", sizes=WHOLE_BLOCKS)
    write_bitsandbytes(tmp_path / "plain", tmp_path / "packed", **BITSANDBYTES[kind])
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    found = 0
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                reference.get_submodule(name).weight.copy_(values)
                found += 1
        prompt = torch.tensor([draw_prompt(30)])
        theirs, plain = quantised(prompt).logits, reference(prompt).logits
    assert found >= 18
    assert (theirs - plain).abs().max() < 0.15 * plain.abs().max()
    _compare(tmp_path / "packed", reference, mode, tokenizer_folder)


@pytest.mark.parametrize("mode", ["layers", "cut", "device-disk"])
def test_int8_is_computed_weight_only(mode: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """LLM.int8 picks outliers over all rows of a batch, so that a neighbour would change the bits."""
    reference = make_model("llama", tmp_path / "plain")
    write_bitsandbytes(tmp_path / "plain", tmp_path / "packed", load_in_8bit=True)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, bnb.nn.Linear8bitLt):
                weight = module.weight
                scales = weight.SCB if weight.SCB is not None else module.state.SCB
                values = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
                reference.get_submodule(name).weight.copy_(values)
    _compare(tmp_path / "packed", reference, mode, tokenizer_folder)


def test_families_with_quantised_linears(tmp_path: Path, tokenizer_folder: Path) -> None:
    for number, family in enumerate(("qwen2", "gemma3", "phi3-window", "stablelm")):
        folder = tmp_path / str(number)
        reference = make_model(family, folder)
        pack, quantisation = PACKERS["fp8"]
        write_quantised(folder, reference, pack, quantisation, leave="nothing")
        _compare(folder, reference, "layers", tokenizer_folder)


@pytest.mark.parametrize(
    ("family", "mode"), by_turns(["deepseek-v3", "llama4-text"], ("tight", "layers"), ("cut", "device-host"))
)
def test_families_that_take_one_sequence_per_row_block(
    family: str, mode: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Their attention stays one unit; a router that derives from Linear stays what it is."""
    reference = make_model(family, tmp_path)
    pack, quantisation = PACKERS["compressed-fp8"]
    write_quantised(tmp_path, reference, pack, quantisation, leave="nothing")
    add_tokenizer(tmp_path, tokenizer_folder)
    prompts = [draw_prompt(length) for length in (70, 5)]
    run = run_greedily(config_for(tmp_path, mode), prompts)
    assert_equals(run, reference, prompts, TOLERANCE)
