"""``layerstream demo``: questions about the bundled documents, the model streamed past a budget smaller than itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.core.sizes import format_size, parse_size
from layerstream.demo.retrieval import Retriever, load_documents

if TYPE_CHECKING:
    from layerstream.demo.answering import Answer
    from layerstream.engine import LayerStream

FOLDER = Path(__file__).parent.parent / "demo"
BUDGET_SHARE = 0.95  # of the model's weights: they cannot all be there at a time
NEXT = (
    ("chat demo", "talk with the bundled reader"),
    ("plan Qwen/Qwen3-8B --memory 3GiB", "what a model that does not fit would take"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the bundled documents, its answer, and the document that has it; None if none has."""

    question: str
    answer: str
    document: str | None

    def is_answered_by(self, text: str) -> bool:
        """Whether *text* says the same, but for case and the final stop."""
        return _plain(text) == _plain(self.answer)


def demo(
    memory: Annotated[
        str | None, typer.Option(help="The budget, such as 3600KiB; a little less than the model if not given.")
    ] = None,
) -> None:
    """Answer questions about 20 bundled documents through LangChain and LlamaIndex; exits 1 if an answer is wrong."""
    from layerstream.checkpoint.hub import bundled_reader
    from layerstream.demo.answering import langchain_chain, llama_index_query_engine
    from layerstream.engine import LayerStream

    weight_bytes = sum(path.stat().st_size for path in bundled_reader().glob("*.safetensors"))
    budget = int(BUDGET_SHARE * weight_bytes) if memory is None else parse_size(memory)
    documents, questions = load_documents(FOLDER / "documents"), load_questions(FOLDER / "questions.json")
    half = (len(questions) + 1) // 2
    with LayerStream("demo", memory=budget) as engine:
        _introduce(engine, len(documents), len(questions))
        retriever = Retriever(documents)
        typer.echo("\nLangChain: langchain_layerstream.LayerStreamLLM in a chain")
        num_right = ask_all(engine, langchain_chain(engine, retriever), questions[:half])
        typer.echo("\nLlamaIndex: llama_index.llms.layerstream.LayerStreamLLM in a query engine")
        num_right += ask_all(engine, llama_index_query_engine(engine, retriever), questions[half:])
        _conclude(engine, num_right, len(questions))
    if num_right < len(questions):
        raise typer.Exit(1)


def load_questions(path: Path) -> list[Question]:
    """The questions in a JSON file."""
    return [Question(**row) for row in json.loads(path.read_text("utf-8"))]


def ask_all(engine: LayerStream, ask: Callable[[str], Answer], questions: list[Question]) -> int:
    """Ask, print what came back and what it took; the number of right answers."""
    from layerstream.cli.report import describe_work

    num_right = 0
    for question in questions:
        before = engine.stats()
        answer = ask(question.question)
        is_right = question.is_answered_by(answer.text)
        num_right += is_right
        typer.echo(f"\n{question.question}")
        typer.echo(f"  {typer.style(answer.text, bold=True)}  [{_source(question, answer)}]")
        if not is_right:
            typer.echo(typer.style(f"  wrong: expected {question.answer}", fg="red"))
        typer.echo(typer.style(f"  {describe_work(before, engine.stats())}", dim=True))
    return num_right


def _source(question: Question, answer: Answer) -> str:
    """The document that has the answer if it was read, else those that were."""
    if question.document in answer.documents:
        return question.document or ""
    return "not in " + ", ".join(answer.documents)


def _introduce(engine: LayerStream, num_documents: int, num_questions: int) -> None:
    stats, plan = engine.stats(), engine.plan
    typer.echo(f"{num_documents} documents, {num_questions} questions, and the bundled reader:")
    typer.echo(f"  {format_size(stats.model_bytes):>8}  weights of the model")
    typer.echo(f"  {format_size(stats.budget_bytes):>8}  memory budget for weights, KV and activations together")
    typer.echo(f"  {format_size(plan.streamed_bytes):>8}  read from disk again for every sweep")


def _conclude(engine: LayerStream, num_right: int, num_questions: int) -> None:
    from layerstream.cli.report import format_streamed

    stats = engine.stats()
    typer.echo(
        f"\n{num_right} of {num_questions} correct: {stats.sweeps} sweeps, "
        f"{format_streamed(stats.weight_bytes_streamed)} streamed,\nplanned memory of the engine "
        f"{format_size(stats.planned_memory_bytes)} of {format_size(stats.budget_bytes)}, "
        f"the model has {format_size(stats.model_bytes)}."
    )
    typer.echo("\nTry next:")
    for arguments, purpose in NEXT:
        typer.echo(f"  # {purpose}\n  {_command()} {arguments}")


def _command() -> str:
    """What the shell calls this command: its path, where an environment is not activated."""
    if which("layerstream") is not None:
        return "layerstream"
    beside = Path(sys.executable).with_name("layerstream")
    return os.path.relpath(beside) if beside.exists() else "python -m layerstream"


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
