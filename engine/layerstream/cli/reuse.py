"""``layerstream reuse check``: one's own questions with passages that are moved, and with prompts computed in full."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.api.params import SamplingParams
from layerstream.cli.options import EngineOptions, Model, with_options
from layerstream.demo.retrieval import Passage, Retriever, load_documents
from layerstream.errors import ConfigurationError, DocumentError
from layerstream.text.prompt import QUESTION_PROMPT, Prompt

if TYPE_CHECKING:
    from layerstream.api.completion import Completion
    from layerstream.engine import LayerStream

ANSWER_TOKENS = 32

app = typer.Typer(help="What using KV again costs and brings.", no_args_is_help=True)


@app.callback()
def reuse() -> None:
    """Keep ``check`` a command of its own, beside those to come."""


@dataclass(slots=True)
class _Way:
    """Answers to all questions, one way."""

    answers: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])
    prompt_tokens: int = 0
    num_blended: int = 0
    reused_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """One more answer."""
        usage = completion.usage
        self.answers.append(completion.text.strip())
        self.seconds.append(completion.metrics.first_token_seconds)
        self.num_blended += usage.blended_tokens > 0
        self.prompt_tokens += usage.prompt_tokens
        self.reused_tokens += min(usage.prompt_tokens, usage.cached_tokens + usage.blended_tokens)


@app.command()
@with_options
def check(
    docs: Annotated[Path, typer.Option(help="A folder of txt, md and pdf files, or one such file.")],
    questions: Annotated[Path, typer.Option(help="A file with a question a line; its answer behind a tab, if known.")],
    model: Model = "demo",
    passages: Annotated[int, typer.Option(min=1, help="Passages of the documents in a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = ANSWER_TOKENS,
    *,
    engine: EngineOptions,
) -> None:
    """Ask your own questions both ways: how many answers are the same, how many right, and how soon they begin."""
    asked = _read(questions)
    retriever = Retriever(load_documents(docs, lambda line: typer.echo(line, err=True)))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    full, moved = _Way(), _Way()
    chosen = engine.arguments()
    if {"reuse", "kv_store"} & chosen.keys():
        raise ConfigurationError("reuse check compares both ways, without a store: leave out --reuse and --kv-store")
    with engine.open(model, reuse="anywhere", kv_store=None) as opened:
        opened.trust_reuse()
        for question, _ in asked:  # in the order of their rank, as a retriever has them
            found = retriever.retrieve(question, passages) or retriever.opening(passages)
            prompt, texts = _prompt(opened, question, found), [passage.text for passage in found]
            moved.add(opened.generate(prompt, params, passages=texts, tenant="moved")[0])
        for question, _ in asked:
            found = retriever.retrieve(question, passages) or retriever.opening(passages)
            full.add(opened.generate(_prompt(opened, question, found), params, passages=None, tenant="in full")[0])
    _show(asked, full, moved)


def _prompt(engine: LayerStream, question: str, found: list[Passage]) -> Prompt:
    text = QUESTION_PROMPT.format(context="\n\n".join(passage.text for passage in found), question=question)
    return [{"role": "user", "content": text}] if engine.has_chat_template else text


def _read(questions: Path) -> list[tuple[str, str | None]]:
    """Questions, each with its answer if it has one.

    Raises:
        DocumentError: the file cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in questions.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{questions}: cannot be read ({error}); pass a file with a question a line") from error
    parts = [line.partition("\t") for line in lines if line]
    found = [(question.strip(), answer.strip() or None) for question, _, answer in parts]
    if not found:
        raise DocumentError(f"{questions}: no questions in it; write one a line")
    return found


def _show(asked: list[tuple[str, str | None]], full: _Way, moved: _Way) -> None:
    """A line for each way, and the questions that are answered otherwise."""
    known = [(number, answer) for number, (_, answer) in enumerate(asked) if answer is not None]
    table = Table("", "the same answer", *(["right"] if known else []), "first token", "of the prompt reused")
    for name, way in (("computed in full", full), ("passages moved", moved)):
        same = sum(a == b for a, b in zip(way.answers, full.answers, strict=True))
        right = sum(way.answers[number] == answer for number, answer in known)
        table.add_row(
            name,
            f"{same} of {len(asked)}",
            *([f"{right} of {len(known)}"] if known else []),
            f"{statistics.median(way.seconds):.2f} s",
            f"{way.reused_tokens / way.prompt_tokens:.0%}",
        )
    Console().print(table)
    typer.echo(f"of {moved.num_blended} of {len(asked)} prompts passages were moved")
    for (question, _), exact, other in zip(asked, full.answers, moved.answers, strict=True):
        if exact != other:
            typer.echo(f"{question}\n  in full: {exact}\n  moved:   {other}")
