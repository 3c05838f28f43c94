"""AirLLM's programs, and the tensors that they get, against plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import AutoModel, ConfigurationError, EmptyPrompt, PromptError

from tests.models import make_model, make_tokenizer

PAD = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[AutoModel]:
    model = AutoModel.from_pretrained(folder)
    yield model
    model.close()


def test_the_readme_of_airllm(model: AutoModel, reference: Any) -> None:
    input_text = ["the quick brown fox"]
    input_tokens = model.tokenizer(
        input_text, return_tensors="pt", return_attention_mask=False, truncation=True, max_length=128, padding=False
    )
    generation_output = model.generate(
        input_tokens["input_ids"], max_new_tokens=20, use_cache=True, return_dict_in_generate=True
    )
    expected = reference.generate(input_tokens["input_ids"], max_new_tokens=20, do_sample=False)
    assert generation_output.sequences.dtype == torch.int64
    assert generation_output.sequences.tolist() == expected.tolist()
    assert generation_output["sequences"] is generation_output.sequences
    assert model.tokenizer.decode(generation_output.sequences[0]).startswith("the quick brown fox")


def test_left_padding_as_transformers_does_it(model: AutoModel, reference: Any) -> None:
    ids = torch.tensor([[PAD, PAD, 70, 71, 72], [80, 81, 82, 83, 84], [PAD, 90, 91, 92, 93]])
    mask = (ids != PAD).long()
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False).tolist()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=7).tolist() == expected
    assert model.generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=7).tolist() == expected
    assert model.generate(ids, max_new_tokens=7).tolist() == expected  # the mask follows from the pad tokens


def test_right_padding_leaves_the_answers_alone(model: AutoModel) -> None:
    ids = torch.tensor([[70, 71, 72, PAD, PAD], [80, 81, 82, 83, 84]])
    rows = model.generate(ids, max_new_tokens=6)
    assert rows[:, :5].tolist() == ids.tolist()
    assert rows[0, 5:].tolist() == model.generate(ids[0, :3], max_new_tokens=6)[0, 3:].tolist()
    assert rows[1, 5:].tolist() == model.generate(ids[1], max_new_tokens=6)[0, 5:].tolist()


def test_answers_that_end_early_are_padded(model: AutoModel) -> None:
    ids = torch.tensor([[70, 71, 72], [80, 81, 82]])
    whole = model.generate(ids, max_new_tokens=6)
    end = int(whole[0, 4])
    rows = model.generate(ids, max_new_tokens=6, eos_token_id=end, pad_token_id=9)
    assert rows[0, 3:].tolist() == [int(whole[0, 3]), end, *[9] * (rows.shape[1] - 5)]
    assert rows[1, 3:4].tolist() == whole[1, 3:4].tolist()


def test_new_tokens_are_twenty_or_what_max_length_leaves(model: AutoModel) -> None:
    ids = torch.tensor([[70, 71, 72]])
    options = {"do_sample": True, "temperature": 100.0}  # so that no EOS ends it early
    torch.manual_seed(1)
    assert model.generate(ids, **options).shape == (1, 23)
    assert model.generate(ids, max_length=10, **options).shape == (1, 10)
    with pytest.raises(ConfigurationError, match="max_length is 3; the prompt has 3 tokens already"):
        model.generate(ids, max_length=3)


def test_sampling_follows_torch_s_seed(model: AutoModel) -> None:
    ids = torch.tensor([[70, 71, 72]])

    def draw(seed: int, **options: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=8, do_sample=True, **options).tolist()

    greedy = model.generate(ids, max_new_tokens=8).tolist()
    assert draw(1, temperature=3.0) == draw(1, temperature=3.0) != draw(2, temperature=3.0)
    assert draw(1, top_k=1) == draw(2, top_p=1e-6) == greedy
    rows = draw(3, temperature=3.0, num_return_sequences=3)
    assert len({tuple(row) for row in rows}) == 3


def test_greedy_ignores_sampling_options(model: AutoModel) -> None:
    ids = torch.tensor([[70, 71, 72]])
    assert torch.equal(
        model.generate(ids, do_sample=False, temperature=5.0), model.generate(ids, num_beams=1, use_cache=False)
    )


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"stopping_criteria": ["x"]}, {"output_scores": True}])
def test_what_would_change_the_result_is_refused(model: AutoModel, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"does not support {next(iter(options))}="):
        model.generate(torch.tensor([[70]]), **options)


def test_rows_without_tokens_are_refused(model: AutoModel) -> None:
    with pytest.raises(EmptyPrompt):
        model.generate(torch.tensor([[70, 71], [PAD, PAD]]))
    with pytest.raises(PromptError, match=r"input_ids has shape \(1, 0\)"):
        model.generate(torch.zeros(1, 0))


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_compression_converts_once(
    folder: Path, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERSTREAM_PACKED", str(tmp_path))
    for _ in range(2):
        model = AutoModel.from_pretrained(folder, compression=compression)
        assert model.generate(torch.tensor([[70, 71]]), max_new_tokens=2).shape == (1, 4)
        (packed,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {"4bit": "nf4", "8bit": "int8"}[compression] in packed.name
    with pytest.raises(ConfigurationError, match="expected '4bit', '8bit' or None"):
        AutoModel.from_pretrained(folder, compression="2bit")


def test_options_that_are_not_needed_are_taken(folder: Path) -> None:
    with pytest.warns(UserWarning, match="is not needed") as caught:
        model = AutoModel.from_pretrained(
            folder,
            device="cpu",
            dtype=torch.float32,
            max_seq_len=512,
            layer_shards_saving_path="/nowhere",
            hf_token=None,
        )
    model.close()
    assert [str(warning.message) for warning in caught] == [
        "max_seq_len is not needed: the context is as long as the model's",
        "layer_shards_saving_path is not needed: the checkpoint is not rewritten",
    ]
    assert {Path(warning.filename).name for warning in caught} == {"test_airllm.py"}


def test_unknown_options_are_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match="compresion"):
        AutoModel.from_pretrained(folder, compresion="4bit")
