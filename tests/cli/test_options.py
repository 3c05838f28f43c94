"""The sets of options: one for each argument of the engine, the same for every command that runs a model."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from layerstream import ConfigurationError, KVStoreUnusable, LayerStream, SamplingParams
from layerstream.cli import app
from layerstream.cli.failures import exit_code, explain, in_shell_words
from layerstream.cli.options import OPTION_NAMES, EngineOptions, SamplingOptions
from layerstream.core.formats import FORMATS
from layerstream.errors import DocumentError, PromptTooLong, ReadError, StorageFull
from typer.main import get_command
from typer.testing import CliRunner

RUNNING = ("run", "chat", "ask", "warm", "bench", "bench rag", "bench experts", "plan", "compare")
NOT_IN_A_SHELL = {"self", "model", "token", "progress", "max_queued"}
"""HF_TOKEN names the token, a terminal shows progress, and nobody queues in a shell."""


def options_of(path: str) -> set[str]:
    command = get_command(app)
    for name in path.split():
        command = command.commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def option(field: str) -> str:
    return f"--{OPTION_NAMES.get(field, field).replace('_', '-')}"


def test_there_is_an_option_for_each_argument_of_the_engine() -> None:
    arguments = set(inspect.signature(LayerStream.__init__).parameters) - NOT_IN_A_SHELL
    assert arguments <= {field.name for field in dataclasses.fields(EngineOptions)}


@pytest.mark.parametrize("command", RUNNING)
def test_every_command_that_runs_a_model_has_all_of_them(command: str) -> None:
    assert {option(field.name) for field in dataclasses.fields(EngineOptions)} <= options_of(command)


@pytest.mark.parametrize("command", ["run", "chat", "ask", "bench rag"])
def test_every_command_that_samples_has_the_same_options(command: str) -> None:
    assert {option(field.name) for field in dataclasses.fields(SamplingOptions)} <= options_of(command)


def test_what_plan_advises_is_an_option_of_ask() -> None:
    changes = [f"quantization={kind!r}" for kind in FORMATS]
    changes += ["memory='3 GiB'", "host_memory='64GiB'", "draft_model='x'", "max_context=4096", "kv_store=None"]
    for change in changes:
        named = re.findall(r"--[a-z-]+", in_shell_words(f"{change}: 2.0 times faster"))
        assert len(named) == 1
        assert set(named) <= options_of("ask")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pass quantization='int4'", "pass --quantization int4"),
        ("with memory='2.0 MiB'", "with --memory '2.0 MiB'"),
        ("allow_untested=True tries it", "--allow-untested tries it"),
        ("kv_store=None switches it off", "--no-kv-store switches it off"),
        ("max_context=512", "--context 512"),
        ("pass another folder as kv_store", "pass another folder as --kv-store"),
        ("SamplingParams.max_tokens is 0", "SamplingParams.max_tokens is 0"),
        ("KVStoreConfig(max_bytes=5)", "KVStoreConfig(max_bytes=5)"),
        ("/home/kv_store/x and 'kv_store'", "/home/kv_store/x and 'kv_store'"),
        ("it reads memory", "it reads memory"),
    ],
)
def test_arguments_are_named_as_options(text: str, expected: str) -> None:
    assert in_shell_words(text) == expected


def test_options_make_the_config_that_the_engine_makes(folder: Path) -> None:
    options = EngineOptions(memory="64MiB", dtype="float32", max_context=256, no_kv_store=True, chunk_tokens=32)
    with options.open(str(folder), progress=False) as engine:
        assert engine._parts.config == options.config(str(folder))


def test_what_is_not_given_leaves_room_for_a_default() -> None:
    assert EngineOptions().arguments() == {}
    assert EngineOptions(memory="1GiB,2GiB").arguments() == {"memory": ["1GiB", "2GiB"]}
    assert EngineOptions(no_kv_store=True).arguments() == {"kv_store": None}
    with pytest.raises(ConfigurationError, match="exclude each other"):
        EngineOptions(no_kv_store=True, kv_store="x").arguments()
    assert SamplingOptions().params(temperature=0.0) == SamplingParams(temperature=0.0)
    assert SamplingOptions(temperature=0.5).params(temperature=0.0).temperature == 0.5
    assert SamplingOptions(stop=["\\n", "end"]).params().stop == ("\n", "end")


def test_exit_codes_tell_whose_fault_it_is() -> None:
    for error in (ConfigurationError("x"), DocumentError("x"), PromptTooLong("x", num_tokens=9), KVStoreUnusable("x")):
        assert exit_code(error) == 2
    for error in (StorageFull("x"), ReadError("x"), OSError(5, "Input/output error", "/x"), KeyError("x")):
        assert exit_code(error) == 1
    assert explain(OSError(5, "Input/output error", "/x")) == "/x: Input/output error"
    assert "fault of layerstream" in explain(KeyError("x"))


@pytest.mark.parametrize("path", ["", *RUNNING, "ls", "pack", "doctor", "demo", "kv", "kv ls", "kv import"])
def test_help_is_short_everywhere_and_fits(path: str) -> None:
    result = CliRunner().invoke(app, [*path.split(), "-h"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["aks"], "'ask'"), (["rnu"], "'run'"), (["chta"], "'chat'"), (["plna"], "'plan'"), (["docter"], "'doctor'"),
        (["quantize"], "'pack'"), (["generate"], "'run'"), (["list"], "'ls'"), (["kv", "claer"], "'clear'"),
        (["bench", "expert"], "'experts'"), (["zzzz"], "There are run, chat, ask"), (["ask", "--modle"], "--model"),
    ],
)  # fmt: skip
def test_what_was_mistyped(typed: list[str], meant: str) -> None:
    result = CliRunner().invoke(app, typed, env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert meant in result.stderr


def test_options_before_a_command_of_bench_are_not_dropped() -> None:
    result = CliRunner().invoke(app, ["bench", "--memory", "1GiB", "rag"])
    assert result.exit_code == 2
    assert "layerstream bench rag" in result.stderr


@pytest.mark.parametrize("command", [["bench"], ["bench", "experts"]])
def test_sweeps_of_one_token_have_no_guesses(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--draft-model", "demo"])
    assert result.exit_code == 2
    assert "bench rag" in result.stderr


def test_what_is_on_unless_told_otherwise() -> None:
    assert EngineOptions().arguments() == {}
    assert EngineOptions(cuda_graphs=False).arguments() == {"cuda_graphs": False}
