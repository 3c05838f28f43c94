"""The command line as a user meets it: answers on stdout, one line per error, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import layerstream
import pytest
import transformers
from layerstream import LayerStream, SamplingParams
from layerstream.cli import app
from layerstream.text.prompt import QUESTION_PROMPT
from typer.testing import CliRunner, Result

from tests.models import make_model, make_tokenizer

QUESTION = "Who approves travel?"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "travel.md").write_text("Mira approves travel.")
    (tmp_path / "food.md").write_text("The kitchen opens at noon.")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "layerstream", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    )  # fmt: skip


def test_ask_prints_the_answer_and_says_what_it_read(model: Path, docs: Path) -> None:
    result = run("ask", "--model", model, "--docs", docs, "--max-tokens", 8, QUESTION)
    prompt = QUESTION_PROMPT.format(context="Mira approves travel.", question=QUESTION)
    with LayerStream(model) as engine:
        expected = engine.generate(
            [{"role": "user", "content": prompt}], SamplingParams(max_tokens=8, temperature=0.0)
        )[0]
    assert result.exit_code == 0
    assert result.stdout == expected.text.lstrip() + "\n"
    source, work = result.stderr.splitlines()
    assert source == "from travel.md"
    assert re.fullmatch(r"[\d.]+ s · 8 sweeps · \d+ tokens · 0 MB streamed · plan [\d.]+ MiB of [\d.]+ [MG]iB", work)
    assert len(work) <= 80


def test_ask_reads_fewer_passages_where_the_context_is_short(model: Path, docs: Path) -> None:
    for number in range(6):
        (docs / f"trip-{number}.md").write_text("travel " * (5 + number))
    result = run("ask", "--model", model, "--docs", docs, "--max-tokens", 4, "--passages", 7, QUESTION)
    assert result.exit_code == 0
    assert result.stderr.startswith("from travel.md, trip-")
    (docs / "travel.md").write_text("travel " * 200)
    result = run("ask", "--model", model, "--docs", docs / "travel.md", QUESTION)
    assert result.exit_code == 2
    assert "layerstream: the prompt has" in result.stderr


@pytest.mark.parametrize("question", ["What is this about?", "Summarize the documents", "Zzz?"])
def test_ask_reads_the_documents_in_order_where_the_question_names_nothing(
    model: Path, docs: Path, question: str
) -> None:
    (docs / "scan.pdf").write_bytes(b"%PDF-1.4")
    result = run("ask", "--model", model, "--docs", docs, "--max-tokens", 2, question)
    assert result.exit_code == 0, result.output
    skipped, source, *_ = result.stderr.splitlines()
    assert skipped.startswith("2 files read, 1 skipped: scan.pdf is no PDF that can be read")
    assert source == "from food.md, travel.md"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ask", "--docs", "{docs}/nowhere", QUESTION],
            "layerstream: {docs}/nowhere: no such folder; pass a folder of",
        ),
        (["ask", "--docs", "{docs}", "--model", "nowhere", QUESTION], "layerstream: 'nowhere' is no folder here"),
        (["ask", "--docs", "{docs}", "--memory", "3GBs", QUESTION], "layerstream: cannot read '3GBs' as a size"),
        (
            ["ask", "--docs", "{docs}", "--memory", "9KiB", QUESTION],
            "layerstream: a memory budget of 9.0 KiB is too small",
        ),
        (["ask", "--docs", "{docs}", "--max-tokens", "0", QUESTION], "layerstream: SamplingParams.max_tokens is 0"),
        (["plan", "{model}", "--memory", "9KiB"], "layerstream: a memory budget of 9.0 KiB is too small"),
        (["demo", "--memory", "9KiB"], "layerstream: a memory budget of 9.0 KiB is too small"),
    ],
)
def test_errors_are_one_line(model: Path, docs: Path, arguments: list[str], message: str) -> None:
    filled = [argument.format(docs=docs, model=model) for argument in arguments]
    if "ask" in filled and "--model" not in filled:
        filled += ["--model", str(model)]
    result = run(*filled)
    assert result.exit_code == 2
    assert result.stderr.startswith(message.format(docs=docs))
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_debug_shows_where_an_error_comes_from(docs: Path) -> None:
    for arguments in (["--debug", "ask"], ["ask", "--debug"]):
        result = run(*arguments, "--docs", docs / "nowhere", QUESTION)
        assert isinstance(result.exception, layerstream.DocumentError)


def test_plan_says_where_the_budget_goes(model: Path) -> None:
    result = run("plan", model, "--memory", "64MiB")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["budget", "64.0", "MiB"]
    for name in ("minimum budget", "whole process", "sweep", "first token, cold", "tokens per second", "KV"):
        assert any(line.startswith(name) for line in lines)
    assert max(map(len, lines)) <= 80


def test_plan_for_a_device_that_is_not_here(model: Path) -> None:
    result = run("plan", model, "--device", "cuda", "--memory", "400MiB", "--host-memory", "1GiB")
    assert result.exit_code == 0, result.stderr
    assert "of the device" in result.stdout
    assert "from host to device" in result.stdout
    assert "how fast it would be: run this where there is cuda" in result.stdout


def test_plan_as_if_packed(model: Path) -> None:
    plain, packed = (run("plan", model, "--memory", "64MiB", *more) for more in ([], ["--quantization", "int8"]))
    found = [re.search(r"weights on disk +([\d.]+) ([KM])iB", result.stdout) for result in (plain, packed)]
    assert all(found)
    sizes = [float(match[1]) * {"K": 1, "M": 1024}[match[2]] for match in found if match]
    assert sizes[1] < 0.6 * sizes[0]
    assert run("plan", model, "--quantization", "int3").exit_code == 2


def test_plan_draws_a_sweep(model: Path, tmp_path: Path) -> None:
    result = run("plan", model, "--memory", "64MiB", "--plot", tmp_path / "plan.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert run("plan", model, "--memory", "64MiB", "--plot", tmp_path / "plan.doc").exit_code == 2


def test_doctor_looks_at_everything(model: Path) -> None:
    result = run("doctor", "--model", model)
    assert result.exit_code == 0
    for name in ("versions", "memory", "accelerator", "direct reads", "disk", "products", "cache"):
        assert any(line[2:].startswith(name) for line in result.stdout.splitlines())


def test_doctor_compares_a_model_with_plain_transformers(model: Path, tmp_path: Path) -> None:
    result = run("doctor", model)
    assert result.exit_code == 0, result.stderr
    for words in ("on the tested list", "sees all positions", "streamed, from the store: log-probabilities within"):
        assert words in result.stdout
    transformers.AutoConfig.for_model("minimax").save_pretrained(tmp_path)
    refused = run("doctor", tmp_path)
    assert refused.exit_code == 1
    assert "a cache of its own" in refused.stderr


def test_bench_writes_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = run("bench", "--memory", "4MiB", "--trace", trace)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines()[:4])) <= 80
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"compute", "wait"} < tracks
    assert any(track.startswith("reader-") for track in tracks)
    computed = [event for event in events if event.get("tid") and event["ph"] == "X" and "layers" in event["name"]]
    assert all(event["dur"] >= 0 for event in computed)


def test_usage_errors_exit_2(docs: Path) -> None:
    assert run("ask").exit_code == 2
    assert run("aks").exit_code == 2
    assert run().exit_code == 2


def test_version() -> None:
    result = run("--version")
    assert result.stdout == f"layerstream {layerstream.__version__}\n"


def test_help_is_quick_and_fits_eighty_columns() -> None:
    program = "import sys; sys.argv = ['layerstream', 'ask', '--help']\nfrom layerstream.cli import main\n"
    program += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    *shown, has_torch = done.stdout.splitlines()
    assert has_torch == "False"
    assert max(map(len, shown)) <= 80


def test_ctrl_c_ends_an_answer_at_once(model: Path, docs: Path) -> None:
    asking = start("ask", "--model", model, "--docs", docs, "--max-tokens", 900, QUESTION)
    assert asking.stdout is not None
    assert asking.stdout.read(1)  # the answer has begun
    asking.send_signal(signal.SIGINT)
    _, errors = asking.communicate(timeout=60)
    assert asking.returncode == 130
    assert errors == "\ninterrupted\n"


def test_bench_rag(docs: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("Who approves travel?\n\nWhen does the kitchen open?\n")
    folder = tmp_path / "docs"
    folder.mkdir()
    for path in docs.glob("*.md"):
        path.rename(folder / path.name)
    result = run("bench", "rag", "--docs", folder, "--questions", questions, "--max-tokens", 6, "--memory", "64MiB")
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for words in ("2 questions", "one at a time", "asked again", "all at once", "guesses of answers:"):
        assert words in result.stdout
    assert run("bench", "rag", "--docs", folder).exit_code == 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 2}
    make_model("qwen3-moe", folder, sizes=sizes)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_plan_says_what_a_token_uses_of_a_mixture(mixture: Path) -> None:
    result = run("plan", mixture, "--memory", "26MiB")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^experts +2 of 16  for a token, in each of 3 layers$", result.stdout, re.MULTILINE)
    rates = [int(rate) for rate in re.findall(r"(\d+)%  (?:of experts )?in memory", result.stdout)]
    assert len(rates) >= 2
    assert rates == sorted(rates)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_bench_experts(mixture: Path) -> None:
    result = run("bench", "experts", "--model", mixture, "--memory", "26MiB", "--rows", 1, "--rows", 3)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert re.search(r"^\d+ of 48 experts in memory, 768\.0 KiB each", lines[1])
    (one, three) = (line.split() for line in lines[-2:])
    assert (one[0], three[0]) == ("1", "3")
    assert max(map(len, lines)) <= 80


def test_bench_experts_of_a_model_without_any(model: Path) -> None:
    result = run("bench", "experts", "--model", model)
    assert result.exit_code == 2
    assert result.stderr.startswith("layerstream: no experts of ")
    assert "Traceback" not in result.output


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that no folder can be made in, whoever asks: a file stands in its place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSTREAM_KV_STORE", str(tmp_path / "file" / "kv"))
    return tmp_path / "file" / "kv"


def test_a_store_that_cannot_be_written_is_said(model: Path, docs: Path, unwritable: Path) -> None:
    (docs / "travel.md").write_text("Mira approves travel. " * 40)
    asked = run("ask", "--model", model, "--docs", docs / "travel.md", "--max-tokens", 2, QUESTION)
    assert asked.exit_code == 0
    assert f"layerstream: no KV store: {unwritable} " in asked.stderr
    warmed = run("warm", "--model", model, "--docs", docs / "travel.md")
    assert warmed.exit_code == 2
    assert str(unwritable) in warmed.stderr
    looked = run("doctor", "--model", model)
    assert re.search(rf"^✗ KV store +{re.escape(str(unwritable))}: Not a directory$", looked.stdout, re.MULTILINE)
    assert looked.exit_code == 1


def test_a_full_disk_is_said_before_anything_is_computed(
    model: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "travel.md").write_text("Mira approves travel. " * 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 2**20, 2**20))  # type: ignore[attr-defined]
    result = run("warm", "--model", model, "--docs", docs / "travel.md", "--kv-store", tmp_path / "kv")
    assert result.exit_code == 1
    assert "1.0 MiB are free on its disk, and the store leaves 1.0 GiB free" in result.stderr
    assert "tokens/s" not in result.stdout


def test_plan_takes_the_engine_s_options(model: Path) -> None:
    result = run("plan", model, "--memory", "64MiB", "--context", 200, "--draft-model", model)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"first token, cold .* prompt of 200 tokens", result.stdout)
    assert result.stdout.splitlines()[0].split() != ["budget", "64.0", "MiB"], "the draft model has its share"
