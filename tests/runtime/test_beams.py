"""Beam search and best_of: the answers of transformers, in pages that are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream import ConfigurationError, InvalidSamplingParams, LayerStream, SamplingParams
from layerstream.planner import on_host

from tests.harness import add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import VOCAB_SIZE, make_model


@pytest.mark.parametrize("ends", [(), (7, 31, 200)])
@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (4, 0.0), (5, 2.0)])
def test_equals_transformers(
    engine: LayerStream, llama: tuple[Path, Any], width: int, length_penalty: float, ends: tuple[int, ...]
) -> None:
    params = SamplingParams(
        max_tokens=12, beam_width=width, n=width, length_penalty=length_penalty, ignore_eos=True, stop_token_ids=ends
    )
    prompts = [draw_prompt(length) for length in (40, 9)]
    completions = engine.generate(prompts, params)
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = llama[1].generate(
                torch.tensor([prompt]),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=12,
                length_penalty=length_penalty,
                early_stopping=False,
                do_sample=False,
                eos_token_id=list(ends) or None,
                pad_token_id=0,
            )[:, len(prompt) :]
        for index, own in enumerate(completions[number * width : (number + 1) * width]):
            assert own.index == index
            assert own.token_ids == expected[index][: len(own.token_ids)].tolist()
            assert own.finish_reason == ("stop" if own.token_ids[-1] in ends else "length")
    assert engine._parts.scheduler.num_running == 0
    engine._parts.scheduler.check_integrity()


@pytest.mark.parametrize(("family", "num_going"), [("llama", 1), ("llama", 2), ("llama", 40), ("qwen3_5_text", 2)])
def test_equals_transformers_where_tokens_tie_and_nearly_all_of_them_end(
    tmp_path: Path, tokenizer_folder: Path, family: str, num_going: int
) -> None:
    """Every token has a twin that is as probable; all but a few tokens end the answer."""
    reference = make_model(family, tmp_path, seed=5)
    with torch.no_grad():
        for weights in (reference.lm_head.weight, reference.model.embed_tokens.weight):
            weights[VOCAB_SIZE // 2 :] = weights[: VOCAB_SIZE - VOCAB_SIZE // 2]
    reference.save_pretrained(tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with LayerStream(tmp_path, dtype="float32", progress=False) as engine:
        for length in (5, 40):
            prompt = draw_prompt(length)
            with torch.inference_mode():
                order = reference(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
            ends = order[: VOCAB_SIZE - num_going]
            for width, stops in ((3, ends), (4, ends[-2:]), (3, [])):
                params = SamplingParams(max_tokens=6, beam_width=width, n=width, ignore_eos=True, stop_token_ids=stops)
                own = engine.generate([prompt], params)
                assert [c.token_ids for c in own] == search_with_transformers(reference, prompt, width, 6, stops)


def test_stop_tokens_that_cover_the_vocabulary(engine: LayerStream) -> None:
    ends = tuple(range(VOCAB_SIZE))
    params = SamplingParams(max_tokens=6, beam_width=3, n=3, ignore_eos=True, stop_token_ids=ends)
    found = engine.generate([draw_prompt(9)], params)
    assert [(len(c.token_ids), c.finish_reason) for c in found] == [(1, "stop")] * 3
    assert len({c.token_ids[0] for c in found}) == 3
    assert engine._parts.scheduler.num_running == 0


def search_with_transformers(
    reference: Any, prompt: list[int], width: int, max_tokens: int, ends: list[int]
) -> list[list[int]]:
    with torch.inference_mode():
        found = reference.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=max_tokens,
            early_stopping=False,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=0,
        )[:, len(prompt) :].tolist()
    stops = [next((at for at, token in enumerate(tokens) if token in ends), len(tokens)) for tokens in found]
    return [tokens[: stop + 1] for tokens, stop in zip(found, stops, strict=True)]


def test_beams_share_their_pages(engine: LayerStream) -> None:
    prompt = draw_prompt(3 * 32 + 1)
    engine.generate([prompt], SamplingParams(max_tokens=8, beam_width=4, n=4, ignore_eos=True))
    pool = engine._parts.scheduler.pool
    own = 4 * (pool.pages_for(8) + 1)
    assert pool.peak_used <= pool.pages_for(len(prompt) + 8) + own, "the prompt's pages once"


def test_beams_beside_other_requests(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=10, beam_width=3, ignore_eos=True)
    greedy = SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True)
    alone = engine.generate([draw_prompt(20)], params)[0].token_ids
    expected = engine.generate([draw_prompt(30)], greedy)[0].token_ids
    other = engine.submit(draw_prompt(30), greedy)
    assert engine.generate([draw_prompt(20)], params)[0].token_ids == alone
    assert other.result().token_ids == expected
    cancelled = engine.submit(draw_prompt(20), params)
    cancelled.cancel()
    assert cancelled.result().finish_reason in ("cancelled", "length")
    assert engine._parts.scheduler.num_running == 0


def test_more_beams_than_memory(engine: LayerStream) -> None:
    with pytest.raises(ConfigurationError, match="ask for fewer beams or tokens"):
        engine.generate([draw_prompt(20)], SamplingParams(max_tokens=200, beam_width=32, n=1))


def test_nothing_random_beside_beams() -> None:
    for field, value in (("temperature", 0.5), ("stop", "x"), ("best_of", 3), ("logprobs", 1)):
        with pytest.raises(InvalidSamplingParams, match="beside beam_width"):
            SamplingParams(beam_width=2, **{field: value})
    with pytest.raises(InvalidSamplingParams, match="best_of"):
        SamplingParams(n=3, best_of=2)


def test_best_of_returns_the_most_probable(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=3, ignore_eos=True, logprobs=0)
    prompt = draw_prompt(40)
    every = engine.generate([prompt], SamplingParams(**{**_fields(params), "n": 6}))
    best = engine.generate([prompt], SamplingParams(**{**_fields(params), "n": 2, "best_of": 6, "logprobs": None}))
    ranked = sorted(every, key=lambda c: -sum(entry.logprob for entry in c.logprobs or ()))
    assert [c.token_ids for c in best] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best] == [0, 1]
    assert best[0].logprobs is None
    request = engine.submit(prompt, SamplingParams(**{**_fields(params), "n": 1, "best_of": 3}))
    deltas = list(request)
    assert len(deltas) == 1
    assert deltas[0].text == request.result().text


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def test_beams_take_the_memory_of_others_and_searches_wait_for_each_other(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_units(monkeypatch)
    for name in ("MIN_KV_TOKENS", "WANTED_KV_TOKENS"):
        monkeypatch.setattr(on_host, name, 384)
    monkeypatch.setattr(on_host, "MORE_KV_SHARE", 0.0)
    greedy = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    beams = SamplingParams(max_tokens=30, beam_width=3, n=3, ignore_eos=True)
    with LayerStream(
        llama[0], memory=budget_for(llama[0], "layers"), dtype="float32", max_context=300, progress=False
    ) as engine:
        expected = [c.token_ids for c in engine.generate([draw_prompt(n) for n in (70, 60)], greedy)]
        searched = [[c.token_ids for c in engine.generate([draw_prompt(n)], beams)] for n in (40, 50, 45)]
        for _ in range(3):
            requests = [engine.submit(draw_prompt(n), greedy) for n in (70, 60)]
            searches = [engine.submit(draw_prompt(n), beams) for n in (40, 50, 45)]
            assert [[c.token_ids for c in s.completions(60)] for s in searches] == searched
            assert [request.result(60).token_ids for request in requests] == expected
            engine._parts.scheduler.check_integrity()
        assert engine._parts.kv.swap.written_pages


def test_beams_have_a_state_each(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)
    monkeypatch.setattr(on_host, "MIN_KV_TOKENS", 2048)
    make_model("qwen3_5_text", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with LayerStream(tmp_path, memory=budget_for(tmp_path, "cut"), dtype="float32", progress=False) as engine:
        most = engine.plan.max_sequences
        params = SamplingParams(max_tokens=3, beam_width=most, n=most, ignore_eos=True)
        assert len(engine.generate([draw_prompt(9)], params)) == most
        with pytest.raises(ConfigurationError, match=f"ask for {most} beams"):
            engine.generate([draw_prompt(9)], SamplingParams(max_tokens=3, beam_width=most + 1))
