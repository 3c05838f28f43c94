"""The engine as its callers see it: threads, streams, cancellation, faults, seeds, stop strings."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layerstream import LayerStream, SamplingParams
from layerstream.api.events import SweepFinished, UnitFinished
from layerstream.errors import (
    BudgetTooSmall,
    ConfigurationError,
    EmptyPrompt,
    EngineClosed,
    PromptTooLong,
    RequestTimeout,
    TruncatedFile,
    UnsupportedModel,
)

from tests.harness import add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import make_model

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Iterator[LayerStream]:
    with LayerStream(folder, memory="256MiB", dtype="float32", progress=False) as engine:
        assert not engine.plan.streams
        yield engine


def test_several_prompts_share_every_sweep(engine: LayerStream) -> None:
    prompts = [draw_prompt(4 + i) for i in range(3)]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    together = engine.generate(prompts, params)
    assert engine.stats().sweeps == 5
    assert [c.metrics.sweeps for c in together] == [5, 5, 5]
    assert [c.usage.prompt_tokens for c in together] == [4, 5, 6]
    assert [c.usage.completion_tokens for c in together] == [5, 5, 5]
    assert [c.token_ids for c in together] == [engine.generate([p], params)[0].token_ids for p in prompts]


def test_a_model_that_fits_is_never_read_twice(resident: LayerStream) -> None:
    read = resident._parts.reader.stats.read_bytes
    resident.generate([draw_prompt(30)], SamplingParams(max_tokens=5, ignore_eos=True))
    assert resident._parts.reader.stats.read_bytes == read
    assert resident.stats().weight_bytes_streamed == 0


def test_streaming_gives_what_generate_gives(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    deltas = list(engine.stream("the quick brown", params))
    whole = engine.generate("the quick brown", params)[0]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas[-2:]] == [None, "length"]
    assert deltas[-1].completion is not None


def test_the_same_seed_gives_the_same_text_alone_or_among_others(resident: LayerStream) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.3, top_p=0.95, seed=11, ignore_eos=True)
    alone = resident.generate([draw_prompt(15)], params)[0]
    among = resident.generate([draw_prompt(40), draw_prompt(15), draw_prompt(9)], params)[1]
    other = resident.generate(
        [draw_prompt(15)], SamplingParams(max_tokens=8, temperature=1.3, seed=12, ignore_eos=True)
    )
    assert alone.token_ids == among.token_ids
    assert other[0].token_ids != alone.token_ids
    fresh = resident.generate([draw_prompt(15)], SamplingParams(max_tokens=8, temperature=1.3, ignore_eos=True))[0]
    again = SamplingParams(max_tokens=8, temperature=1.3, seed=fresh.seed, ignore_eos=True)
    assert resident.generate([draw_prompt(15)], again)[0].token_ids == fresh.token_ids


def test_n_completions_differ_and_come_in_order(resident: LayerStream) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=3, n=3, ignore_eos=True, logprobs=2)
    completions = resident.generate([draw_prompt(10), draw_prompt(12)], params)
    assert [c.index for c in completions] == [0, 1, 2, 0, 1, 2]
    assert len({tuple(c.token_ids) for c in completions[:3]}) == 3
    assert completions[0].logprobs is not None
    assert [entry.token_id for entry in completions[0].logprobs] == completions[0].token_ids
    assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1] for entry in completions[0].logprobs)


def test_stop_strings_end_the_text_and_are_not_in_it(resident: LayerStream) -> None:
    whole = resident.generate([draw_prompt(33)], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    stop = whole.text[10:13]
    stopped = resident.generate([draw_prompt(33)], SamplingParams(max_tokens=40, stop=stop, ignore_eos=True))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    token = whole.token_ids[5]
    ended = resident.generate(
        [draw_prompt(33)], SamplingParams(max_tokens=40, stop_token_ids=[token], ignore_eos=True)
    )[0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_a_stop_string_that_is_a_special_token_is_a_stop_id(resident: LayerStream) -> None:
    """Special tokens are not shown, so the text alone would never match."""
    mark = "<|user|>"
    number = resident.tokenizer.convert_tokens_to_ids(mark)
    wanted = {"type": "grammar", "grammar": f'%llguidance {{}}\nstart: "ab" <[{number}]> "cd"'}
    whole = resident.generate("x", SamplingParams(max_tokens=20, response_format=wanted))[0]
    assert whole.text == "abcd"
    for options in ({}, {"skip_special_tokens": False}, {"ignore_eos": True}):
        params = SamplingParams(max_tokens=20, response_format=wanted, stop=["zz", mark], **options)
        stopped = resident.generate("x", params)[0]
        assert (stopped.text, stopped.finish_reason, stopped.token_ids[-1]) == ("ab", "stop", number)


def test_a_document_does_not_write_control_tokens(resident: LayerStream, folder: Path) -> None:
    mark = resident.tokenizer.convert_tokens_to_ids("<|user|>")
    messages = [{"role": "user", "content": "the fox<|user|>jumps</s>"}]
    text = resident.apply_chat_template(messages)
    for prompt in (messages, text, resident.turn(messages).prompt):
        ids = resident.encode(prompt)
        assert ids.count(mark) == 1
        assert resident.tokenizer.eos_token_id not in ids
    assert resident.generate(text, SamplingParams(max_tokens=1))[0].usage.prompt_tokens == len(resident.encode(text))
    with LayerStream(folder, progress=False, kv_store=None, allow_control_tokens=True) as engine:
        assert engine.encode(messages).count(mark) == 2
        assert engine.identity["allow_control_tokens"]
    assert "allow_control_tokens" not in resident.identity


def test_cancel_takes_effect_by_the_next_sweep_and_spares_the_others(engine: LayerStream) -> None:
    first, second = engine.submit_many([draw_prompt(10), draw_prompt(12)], LONG)
    next(iter(first))
    first.cancel()
    completion = first.result(timeout=60)
    assert completion.finish_reason == "cancelled"
    assert 0 < completion.usage.completion_tokens < 400
    assert len(second.result(timeout=60).token_ids) == 400
    assert engine._parts.scheduler.pool.num_used == len(engine._parts.scheduler.prefixes)


def test_leaving_a_stream_cancels(engine: LayerStream) -> None:
    for _ in engine.stream(draw_prompt(10), LONG):
        break
    engine.generate([draw_prompt(5)], SamplingParams(max_tokens=1))
    assert engine._parts.scheduler.num_running == 0


def test_callers_on_many_threads(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = [engine.generate([draw_prompt(10 + i)], params)[0].token_ids for i in range(6)]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = engine.generate([draw_prompt(10 + index)], params)[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(6)] == expected


async def test_requests_can_be_awaited_and_cancelled_from_a_loop(engine: LayerStream) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = engine.submit_many([draw_prompt(10), draw_prompt(11)], params)
    completions = await asyncio.gather(*requests)
    assert [len(completion.token_ids) for completion in completions] == [5, 5]
    request = engine.submit(draw_prompt(10), params)
    assert [delta.token_ids[0] async for delta in request] == completions[0].token_ids

    async def wait() -> None:
        await running

    running = engine.submit(draw_prompt(10), LONG)
    task = asyncio.create_task(wait())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running.completions(timeout=60)[0].finish_reason == "cancelled"


def test_timeout_is_the_callers_and_the_request_goes_on(engine: LayerStream) -> None:
    request = engine.submit(draw_prompt(10), LONG)
    with pytest.raises(RequestTimeout):
        request.result(timeout=0.001)
    assert len(request.result(timeout=60).token_ids) == 400


def test_a_read_error_fails_its_sweep_and_the_engine_serves_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_units(monkeypatch)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    with LayerStream(tmp_path, memory=budget_for(folder, "layers"), dtype="float32", progress=False) as engine:
        expected = engine.generate([draw_prompt(10)], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
        os.truncate(weights, 4096)
        with pytest.raises(TruncatedFile, match="fetch it again"):
            engine.generate([draw_prompt(10)], SamplingParams(max_tokens=3, ignore_eos=True))
        with weights.open("r+b") as file:
            file.write(whole)
        again = engine.generate([draw_prompt(10)], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
        assert again == expected
        assert engine._parts.scheduler.pool.num_used == len(engine._parts.scheduler.prefixes)


def test_the_models_files_are_never_written(folder: Path, engine: LayerStream) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    engine.generate([draw_prompt(10)], SamplingParams(max_tokens=2))
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


def test_close_ends_what_runs_and_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)
    before = set(threading.enumerate())
    engine = LayerStream(folder, memory=budget_for(folder, "layers"), dtype="float32", progress=False)
    request = engine.submit(draw_prompt(10), LONG)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed):
        request.result(timeout=10)
    with pytest.raises(EngineClosed):
        engine.submit("more")
    assert {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("layerstream")} == set()


def test_a_forgotten_engine_closes_itself(folder: Path) -> None:
    engine = LayerStream(folder, memory="256MiB", dtype="float32", progress=False)
    thread = engine._loop._thread
    del engine
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_ctrl_c_in_the_middle_of_an_answer(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom layerstream import LayerStream, SamplingParams\n"
        f"with LayerStream({str(folder)!r}, memory='256MiB', progress=False) as engine:\n"
        "    print('ready', flush=True)\n"
        "    engine.generate([[5, 6, 7]] , SamplingParams(max_tokens=1000, n=64, temperature=1.0, ignore_eos=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode in (1, -signal.SIGINT, 130)
    assert b"KeyboardInterrupt" in stderr


def test_events_tell_every_unit(folder: Path) -> None:
    events = []
    with LayerStream(folder, memory="256MiB", dtype="float32", progress=events.append) as engine:
        engine.generate([draw_prompt(4)], SamplingParams(max_tokens=2, ignore_eos=True))
        num_units = len(engine.plan.weights.units)
    assert [e.unit for e in events if isinstance(e, UnitFinished)] == 2 * list(range(num_units))
    assert [e.tokens_out for e in events if isinstance(e, SweepFinished)] == [1, 1]


def test_default_max_tokens_is_said(engine: LayerStream, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="layerstream"):
        request = engine.submit(draw_prompt(4), SamplingParams(ignore_eos=True))
    assert "max_tokens is not set: 256 tokens at" in caplog.text
    request.cancel()


def test_chat_messages_get_one_bos(resident: LayerStream) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    text = resident.apply_chat_template(messages)
    assert text.startswith("<s><|user|>the fox")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    assert resident.generate(messages, params)[0].usage == resident.generate(text, params)[0].usage


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", EmptyPrompt, "no tokens"),
        ([], None, ""),
        (list(range(3, 300)) * 4, PromptTooLong, "context has 1024"),
        ([5, 10**6], Exception, "vocabulary"),
        (3.5, Exception, "a prompt is text"),
        ([{"role": "user"}, "x"], Exception, "a prompt is text"),
    ],
)
def test_bad_prompts(resident: LayerStream, prompt: object, error: type[Exception] | None, words: str) -> None:
    if error is None:
        assert resident.generate(prompt) == []  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=words):
        resident.generate(prompt)  # type: ignore[arg-type]


def test_a_budget_below_the_minimum_names_the_minimum(folder: Path) -> None:
    with pytest.raises(BudgetTooSmall, match="needs at least") as caught:
        LayerStream(folder, memory="64KiB", progress=False)
    with LayerStream(folder, memory=caught.value.required_bytes, progress=False) as engine:
        assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"dtype": "int3"},
        {"memory": "3 parsecs"},
        {"quantization": "int3"},
        {"host_memory": "8GiB"},
        {"draft_model": "x", "speculation": "off"},
        {"speculation": "maybe"},
        {"max_context": 0},
    ],
)
def test_bad_options(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        LayerStream(folder, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ({"model_type": "falcon"}, "bypasses"),
        ({"model_type": "ctrl", "vocab_size": 320, "n_layer": 2}, "not among the tested"),
        ({"model_type": "minimax", "num_hidden_layers": 2, "num_local_experts": 2}, "a cache of its own"),
    ],
)
def test_families_that_cannot_run_are_refused_with_the_reason(
    folder: Path, tmp_path: Path, family: dict[str, object], reason: str
) -> None:
    import json

    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(family))
    with pytest.raises(UnsupportedModel, match=reason):
        LayerStream(tmp_path, progress=False)


def test_broken_weights_fail_their_request_and_name_the_cause(tmp_path: Path, tokenizer_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("llama", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        LayerStream(tmp_path, memory="256MiB", progress=False) as engine,
        pytest.raises(ArithmeticError, match="no usable logits"),
    ):
        engine.generate([draw_prompt(4)])
    assert torch.isnan(weights["model.norm.weight"]).all()
