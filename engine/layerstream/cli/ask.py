"""``layerstream ask``: a question about a folder of documents, answered by the user's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.api.params import SamplingParams
from layerstream.cli.answering import Answer
from layerstream.cli.options import EngineOptions, Model, SamplingOptions, with_options
from layerstream.demo.retrieval import Passage, Retriever, join_passages, load_documents
from layerstream.text.prompt import QUESTION_PROMPT

if TYPE_CHECKING:
    from layerstream.api.request import Request
    from layerstream.engine import LayerStream

ANSWER_TOKENS = 64  # kept free for the answer where max_tokens does not say


@with_options
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    docs: Annotated[Path, typer.Option(help="A folder of txt, md and pdf files, or one such file.")],
    model: Model = "demo",
    passages: Annotated[int, typer.Option(min=1, help="Passages of the documents to read at most.")] = 4,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Answer a question about a folder of documents. The answer goes to stdout, all else to stderr."""
    params = sampling.params(temperature=0.0)
    retriever = Retriever(load_documents(docs, lambda line: typer.echo(line, err=True)))
    found = retriever.retrieve(question, passages) or retriever.opening(passages)
    from layerstream.cli.report import describe_work

    with engine.open(model) as opened:
        before = opened.stats()
        request, used = submit(opened, question, found, params)
        completion = Answer().show(request)
        typer.echo(f"from {', '.join(dict.fromkeys(passage.document for passage in used))}", err=True)
        typer.echo(f"{completion.metrics.seconds:.1f} s · {describe_work(before, opened.stats())}", err=True)


def submit(
    engine: LayerStream, question: str, found: list[Passage], params: SamplingParams
) -> tuple[Request, list[Passage]]:
    """Hand the question in with the passages *found*, best first: as many as leave room for an answer, at least one."""
    room = engine.context_length - (params.max_tokens or ANSWER_TOKENS)
    for count in range(len(found), 0, -1):
        prompt = QUESTION_PROMPT.format(context=join_passages(found[:count]), question=question)
        if engine.has_chat_template:
            prompt = engine.apply_chat_template([{"role": "user", "content": prompt}])
        if count == 1 or len(engine.tokenizer(prompt)["input_ids"]) <= room:
            return engine.submit(prompt, params), found[:count]
    raise ValueError("no passages to read")
