"""``layerstream demo``: the bundled reader answers the bundled questions within less memory than it has weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from layerstream import LayerStream
from layerstream.cli import app
from layerstream.cli.demo import FOLDER, Question, ask_all, load_questions
from layerstream.core.sizes import parse_size
from layerstream.demo.answering import Answer
from layerstream.demo.retrieval import Retriever, load_documents
from typer.testing import CliRunner

from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerStream]:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    make_tokenizer().save_pretrained(folder)
    with LayerStream(folder) as engine:
        yield engine


def test_answers_everything_within_less_than_the_model() -> None:
    result = CliRunner().invoke(app, ["demo"])
    questions = load_questions(FOLDER / "questions.json")
    assert result.exit_code == 0, result.output
    assert f"{len(questions)} of {len(questions)} correct" in result.stdout
    for question in questions:
        assert question.question in result.stdout
        assert f"  {question.answer}  [{question.document or 'not in '}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    planned, budget, model = re.findall(r"[\d.]+ MiB", result.stdout)[-3:]
    assert parse_size(planned) <= parse_size(budget) < parse_size(model)
    *_, chat, _, plan = result.stdout.splitlines()
    assert chat.endswith("layerstream chat demo")
    assert plan.endswith("layerstream plan Qwen/Qwen3-8B --memory 3GiB")


def test_a_wrong_answer_counts(engine: LayerStream, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        Question("Who?", "Mira Brandal", "a.md"),
        Question("When?", "1952", "b.md"),
        Question("Why?", "-", None),
    ]
    said = {"Who?": "mira Brandal.", "When?": "1925", "Why?": "-"}
    assert ask_all(engine, lambda question: Answer(said[question], ("a.md", "c.md")), questions) == 2
    shown = capsys.readouterr().out
    assert "\nWho?\n  mira Brandal.  [a.md]\n  0 sweeps · 0 tokens · 0 MB streamed · plan" in shown
    assert "  1925  [not in a.md, c.md]\n  wrong: expected 1952\n" in shown


def test_the_retriever_finds_the_document_of_every_question() -> None:
    retriever = Retriever(load_documents(FOLDER / "documents"))
    for question in load_questions(FOLDER / "questions.json"):
        if question.document is not None:
            assert question.document in [passage.document for passage in retriever.retrieve(question.question, 2)]


def test_the_documents_are_about_twenty_and_small() -> None:
    names = [path.name for path in Path(FOLDER, "documents").iterdir()]
    assert len(names) == 20
    assert all(name.endswith(".md") for name in names)
