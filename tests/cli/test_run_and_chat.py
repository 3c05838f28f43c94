"""``run``, ``chat`` and ``ls`` as a user meets them, on pipes and on a terminal."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from layerstream import LayerStream, SamplingParams
from layerstream.cli import app
from layerstream.cli.run import choose, is_model
from layerstream.engine import _say_that_a_toy_answers
from layerstream.errors import ConfigurationError
from typer.testing import CliRunner, Result

SCHEMA = (
    '{"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": false}'
)
PATIENCE = 120


@pytest.fixture(autouse=True)
def _no_model_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSTREAM_MODEL", raising=False)
    monkeypatch.delenv("LAYERSTREAM_DEBUG", raising=False)


def run(*arguments: object, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def expected(model: Path, prompt: object, **params: object) -> str:
    with LayerStream(model, progress=False) as engine:
        return engine.generate([prompt], SamplingParams(**params))[0].text.lstrip()  # type: ignore[arg-type]


def test_run_answers_through_the_chat_template_or_raw(model: Path) -> None:
    greedy = ("--max-tokens", 6, "--temperature", 0)
    result = run("run", model, "Who?", *greedy, "--system", "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(model, messages, max_tokens=6, temperature=0.0) + "\n"
    assert "cut off after 6 tokens" in result.stderr
    raw = run("run", "--model", model, "-", "--raw", *greedy, input="Who?\n")
    assert raw.stdout == expected(model, "Who?", max_tokens=6, temperature=0.0) + "\n"
    assert run("run", model, *greedy, "--raw", input="Who?").stdout == raw.stdout
    assert run("run", model, "Who?", "--raw", "--system", "x").exit_code == 2


def test_run_without_a_model_says_who_answers() -> None:
    _say_that_a_toy_answers.cache_clear()  # another test of this process may have had it said
    result = run("run", "Mira approves travel. Who approves travel?", "--max-tokens", 3)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0].startswith("layerstream: the bundled 3.5 MiB toy answers")


def test_run_gives_json_or_fails(model: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    for schema in (SCHEMA, tmp_path / "schema.json"):
        result = run("run", model, "Which?", "--json-schema", schema, "--max-tokens", 40, "--seed", 3)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["a"] in ("x", "y")
    cut = run("run", model, "Which?", "--json-schema", SCHEMA, "--max-tokens", 2)
    assert cut.exit_code == 1
    assert "not whole: raise --max-tokens" in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (["{model}"], "", "there is no prompt"),
        (["{model}", " "], None, "there is no prompt"),
        (["{model}"], b"\xff\xfe", "stdin is no UTF-8 text"),
        (["{model}", "\udcff"], None, "is no UTF-8 text"),
        (["{model}", "x", "--json-schema", "{{"], None, "is no JSON"),
        (["{model}", "x", "--json-schema", "nowhere.json"], None, "nowhere.json: No such file"),
        (["{model}", "x", "--json-schema", '{"a":' * 5000], None, "is no JSON"),
        (["{model}", "x", "--temperature", "-1"], None, "temperature is -1"),
        (["{model}", "x", "--quantization", "int3"], None, "int3"),
        (["{model}", "x", "--dtype", "bf17"], None, "bf17"),
        (["{model}", "x", "--chunk-tokens", "7"], None, "--chunk-tokens is 7"),
        (["{model}", "word " * 3000], None, "the prompt has"),
        (["./nowhere", "x"], None, "'./nowhere' is no folder here"),
        (["owner/none", "x"], None, "not in the local cache"),
        (["{model}", "x", "--model", "demo"], None, "the model is named twice"),
    ],
)
def test_what_is_wrong_is_one_line(model: Path, arguments: list[str], given: str | bytes | None, words: str) -> None:
    filled = [str(model) if argument == "{model}" else argument for argument in arguments]
    result = run("run", *filled, input=given)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_tracebacks_are_shown_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(run("run", "./nowhere", "x", "--traceback").exception, FileNotFoundError)
    monkeypatch.setenv("LAYERSTREAM_DEBUG", "1")
    assert isinstance(run("run", "./nowhere", "x").exception, FileNotFoundError)


def test_one_word_is_a_model_or_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for word in ("demo", "here", "owner/name", "./x", "~/x", "/x/y", "a.gguf"):
        assert is_model(word), word
    for word in ("Hello", "What is 1/2 of it?", "-", "", "a" * 5000, "who is here"):
        assert not is_model(word), word
    assert choose(["here"], None) == ("here", None)
    assert choose(["Hello"], None) == ("demo", "Hello")
    assert choose(["any", "Hello"], None) == ("any", "Hello")
    assert choose(["here"], "demo") == ("demo", "here")
    monkeypatch.setenv("LAYERSTREAM_MODEL", "mine")
    assert choose([], None) == ("mine", None)
    with pytest.raises(ConfigurationError, match="named twice"):
        choose(["a", "b"], "c")


def test_chat_on_a_pipe_remembers(model: Path) -> None:
    greedy = ("--max-tokens", 4, "--temperature", 0)
    result = run("chat", model, *greedy, input="One\n\n/system Be kind.\nTwo\n/sytem\n/clear\nThree\n/exit\nFour\n")
    assert result.exit_code == 0, result.output
    with LayerStream(model, progress=False) as engine:
        params = SamplingParams(max_tokens=4, temperature=0.0)

        def ask(*messages: tuple[str, str]) -> str:
            listed = [{"role": role, "content": content} for role, content in messages]
            return engine.generate([listed], params)[0].text.lstrip()

        one = ask(("user", "One"))
        two = ask(("system", "Be kind."), ("user", "One"), ("assistant", one), ("user", "Two"))
        three = ask(("system", "Be kind."), ("user", "Three"))
    assert result.stdout == f"{one}\n{two}\n{three}\n"
    assert "did you mean /system?" in result.stderr


def test_chat_forgets_the_oldest_and_says_so(model: Path) -> None:
    lines = [f"{number} " + "word " * 20 for number in range(4)]
    result = run("chat", model, "--max-tokens", 4, "--context", 128, input="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert re.search(r"the context of \d+ tokens is full: the oldest \d+ of the chat's exchanges", result.stderr)


def test_a_pipe_stops_at_what_goes_wrong(model: Path) -> None:
    result = run("chat", model, "--max-tokens", 2, input="word " * 3000)
    assert result.exit_code == 2
    assert "the prompt has" in result.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.shown = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
        self._pid, self._fd = pty.fork()
        if not self._pid:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execve(sys.executable, [sys.executable, "-m", "layerstream", *map(str, arguments)], environment)

    def expect(self, pattern: str, again: str = "") -> None:
        """Wait until *pattern* is shown, after what was waited for before; *again* is typed now and then."""
        end = time.monotonic() + PATIENCE
        later = time.monotonic() + PATIENCE / 20
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown!r}"
            if again and time.monotonic() > later:
                self.type(again)
                later = time.monotonic() + PATIENCE / 20
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    self.shown += self._decode(os.read(self._fd, 65536))
                except OSError:  # it has ended
                    assert re.search(pattern, self.shown), f"{pattern!r} is not in {self.shown!r}"
        self.shown = self.shown[match.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", model, "--max-tokens", 900, "--temperature", 0)
    yield opened
    opened.close()


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(terminal: Terminal) -> None:
    terminal.expect("Ctrl-D ends")
    terminal.expect("> ")
    terminal.type("Who?\n")
    terminal.expect(r"Who\?\r\n[^\r]")  # the answer has begun
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect("> ")
    terminal.type("\x03")  # CPython's readline sees it with the next key if it comes before it waits for one
    terminal.expect("Ctrl-D or /exit ends the chat", again="\x03")
    terminal.expect("> ")
    terminal.type('"""\n')
    terminal.expect("… ")
    terminal.type("\x03")
    terminal.expect("> ", again="\x03")
    terminal.type("/help\n")
    terminal.expect("/clear")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_on_a_pipe_ends_the_command(model: Path) -> None:
    running = start("chat", model, "--max-tokens", 900)
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdin.write("Who?\n")
    running.stdin.flush()
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    assert running.wait(PATIENCE) == 130
    assert "Traceback" not in running.stderr.read()


def test_a_reader_that_leaves_ends_the_command_without_a_word(model: Path) -> None:
    running = start("run", model, "Who?", "--max-tokens", 900)
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.read(1)
    running.stdout.close()
    assert running.wait(PATIENCE) == 141
    assert running.stderr.read() == ""


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "layerstream", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    )  # fmt: skip


def test_ls_has_a_row_for_each_model_whatever_it_is(model: Path, tmp_path: Path) -> None:
    good = _cached(tmp_path, "org/good")
    shutil.copytree(model, good, dirs_exist_ok=True)
    for name, content in {"half": '{"a":', "list": "[]", "layers": '{"num_hidden_layers": -3}', "none": None}.items():
        folder = _cached(tmp_path, f"org/{name}")
        shutil.copytree(model, folder, dirs_exist_ok=True)
        (folder / "config.json").unlink()
        if content is not None:
            settings = json.loads((model / "config.json").read_text())
            merged = {**settings, **json.loads(content)} if name == "layers" else None
            (folder / "config.json").write_text(content if merged is None else json.dumps(merged))
    short = _cached(tmp_path, "org/short")
    shutil.copytree(model, short, dirs_exist_ok=True)
    weights = next(short.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    dangling = _cached(tmp_path, "org/dangling")
    (dangling / "model.safetensors").symlink_to("../../blobs/none")
    (tmp_path / "version.txt").write_text("1")
    result = run("ls", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert set(rows) == {"demo", *(f"org/{name}" for name in "good half list layers none short dangling".split())}
    assert re.search(r"KiB +[\d.]+ MiB  llama: stays in memory", rows["org/good"])
    for name in ("half", "list", "layers", "none", "short", "dangling"):
        assert re.search(r" - +\S+", rows[f"org/{name}"])
        assert "stays" not in rows[f"org/{name}"]
    assert str(tmp_path) not in result.stdout.replace(rows["org/dangling"], "")
    assert run("ls", tmp_path / "nowhere").exit_code == 1


def _cached(cache: Path, name: str) -> Path:
    commit = "0" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot
