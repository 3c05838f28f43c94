"""``layerstream compare``: is it this engine, and which module of it, when a token looks wrong?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerstream.cli.answering import is_terminal, printable
from layerstream.cli.failures import FAILED
from layerstream.cli.options import EngineOptions, with_options
from layerstream.cli.run import STDIN, check_text, read_stdin
from layerstream.hardware.files import check_writable

if TYPE_CHECKING:
    from layerstream.comparing.comparison import Comparison
    from layerstream.comparing.judging import Choice, Culprit

PROMPT = "Why is the sky blue?"


@with_options
def compare(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or 'demo'.")],
    prompt: Annotated[str, typer.Option(help="The prompt that is answered wrongly; '-': what stdin has.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer to look at.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is: no chat template.")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Compare a model's layers and tokens with plain transformers', and name the first module that differs.

    Exits 1 if they differ. Takes the engine's memory, and that of one layer beside it.
    """
    text = check_text(read_stdin() if prompt == STDIN else prompt)
    if report is not None:
        check_writable(report)
    from layerstream.comparing.comparison import compare as run

    show = _show if is_terminal(sys.stderr) else _skip
    found = run(engine.config(model), text, tokens, is_raw=raw, on_progress=show)
    for line in (*_table(found), "", verdict(found)):
        typer.echo(printable(line, sys.stdout))
    if report is not None:
        report.write_text(json.dumps(_plain(as_object(found)), indent=1) + "\n", "utf-8")
    if found.outcome in {"different", "rounding"}:
        raise typer.Exit(FAILED)


def verdict(found: Comparison) -> str:
    """One sentence that says what it came to, and what to do next."""
    other = [choice for choice in found.choices if not choice.agrees]
    if found.outcome == "same":
        return (
            f"same: all modules agree within what {found.dtype} rounds, and the answer's tokens are plain transformers'"
        )
    if found.outcome == "tie":
        return f"same but for a tie: {_token(found, other[0])}; rounding decides between two that are as good as equal"
    if found.outcome == "rounding":
        more = "" if found.dtype == "float32" else ": --dtype float32 shows whether it is that alone"
        return (
            f"different, and no module is to blame: {_token(found, other[0])}; every module agrees by itself, and what "
            f"{found.dtype} rounds adds up{more}"
        )
    assert found.first is not None
    blame = "when the prompt was answered once more it did not: what is read or computed is not the same each time"
    if found.culprit is not None:
        blame = _blame(found.culprit)
    tokens = f"; {_token(found, other[0])}" if other else "; the answer's tokens are the same nevertheless"
    return f"different: {found.first.module} is the first that differs; {blame}{tokens}"


def _blame(culprit: Culprit) -> str:
    """What is wrong with the module."""
    named = f" (expert {', '.join(map(str, culprit.experts))})" if culprit.experts else ""
    if culprit.between is None:
        return f"what {culprit.path}{named} is given agrees, and what it gives does not"
    last, given = (path.rpartition(".")[2] for path in culprit.between)
    return (
        f"what {culprit.path} is given agrees, and what it gives does not: its {last} still agrees and its {given} is "
        "given something else, so it is what it computes between the two"
    )


def _token(found: Comparison, choice: Choice) -> str:
    """What is chosen at one position, and how far it is apart."""
    engine, plain = (repr(found.texts[token]) for token in (choice.engine, choice.plain))
    return (
        f"at token {choice.position} the engine has {engine} and plain transformers {plain}, whose logit is "
        f"{choice.gap:.2g} higher ({choice.share:.2%} of the largest)"
    )


def _table(found: Comparison) -> Iterator[str]:
    yield (
        f"{found.model} in {found.dtype}: {found.num_prompt_tokens} tokens of prompt and {len(found.choices)} of "
        "answer, beside plain transformers"
    )
    yield ""
    width = max(12, *(len(finding.module) for finding in found.findings))
    yield f"{'module':<{width}}  {'off by':>8}  {'of allowed':>10}  {'at token':>8}  {'adds up to':>10}  {'ties':>4}"
    for finding in found.findings:
        allowed = f"{finding.excess:.0%}" if finding.excess < 10 else "> 999%"
        mark = "" if finding.agrees else "  differs"
        yield (
            f"{finding.module:<{width}}  {finding.apart:>8.1e}  {allowed:>10}  {finding.position:>8}  "
            f"{finding.drift:>10.1e}  {finding.num_ties or '':>4}{mark}"
        ).rstrip()


def as_object(found: Comparison) -> dict[str, Any]:
    """All that was found, for JSON."""
    return {
        "model": found.model,
        "dtype": found.dtype,
        "outcome": found.outcome,
        "verdict": verdict(found),
        "prompt_tokens": found.num_prompt_tokens,
        "tolerance": asdict(found.tolerance),
        "culprit": None if found.culprit is None else asdict(found.culprit),
        "modules": [{**asdict(finding), "agrees": finding.agrees} for finding in found.findings],
        "tokens": [
            {
                **asdict(choice),
                "agrees": choice.agrees,
                "engine_text": found.texts[choice.engine],
                "plain_text": found.texts[choice.plain],
            }
            for choice in found.choices
        ],
    }


def _plain(value: Any) -> Any:
    """*value* without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(what: str, done: int, count: int) -> None:
    line = f"\r{what}: {done} of {count}".ljust(60)
    typer.echo(line + ("\n" if done == count else ""), nl=False, err=True)


def _skip(what: str, done: int, count: int) -> None:
    pass
