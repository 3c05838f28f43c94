"""Contextual ingestion: a line for each chunk of a document that says where in it the chunk stands.

A chunk that says "it was closed in 1931" is found by nobody who asks for the hall of Brenvik. So the model, with the
document before it, writes a line that names what the chunk is about; a retriever then indexes both. Every question
begins with the document, and all chunks of a document are asked at once: the document is computed once, and a sweep
adds a token to every line. So all lines of a document cost about as many sweeps as one.

A document that the context does not hold is replaced by *windows*: pieces of the document, half overlapping, of which
each chunk is shown the one where it is nearest to the middle. Chunks with the same window share it as they would the
document. What decides is pure (:func:`spans_of`, :func:`windows_of`).

What goes wrong with a chunk is its own: it has no line, and the others have theirs. A chunk that leaves a window next
to no room is shown the smallest one, and takes none from the others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from layerstream.api.params import SamplingParams
from layerstream.api.request import Request
from layerstream.errors import ConfigurationError, DeviceLost, EngineClosed, LayerStreamError, PromptTooLong
from layerstream.waves import Waves

if TYPE_CHECKING:  # wrappers import this file, and bring no torch
    from layerstream.text.prompt import Prompt

logger = logging.getLogger(__name__)

INSTRUCTIONS = (
    "You are given a document and then a part of it. Write one short sentence that says what the part is about and "
    "where in the document it stands, so that it is found by search: name what it speaks of. Write nothing else.\n\n"
    "Document:\n{document}\n\nPart:\n{chunk}\n\nThe sentence about this part:"
)
"""What the model is asked. What is the same for all chunks stands before them, so it is computed once."""

MAX_TOKENS = 64
AT_ONCE = 64  # chunks of several documents
_SHRINK = 0.8
_LEAST_CHARACTERS = 200

Span = tuple[int, int]
"""Where a text begins in another one, and where it ends."""


class Engine(Protocol):
    """What situating needs of an engine."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer."""
        ...

    @property
    def max_queued(self) -> int | None:
        """Answers that may wait for their turn; ``None``: any number."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be messages."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of *prompt*."""
        ...

    @property
    def submit_many(self) -> Callable[..., list[Request]]:
        """Hand prompts in with parameters and terms, to join the same sweep."""
        ...


@dataclass(frozen=True, slots=True)
class Chunked:
    """A document and its chunks; *starts* are where they begin in it, ``None`` where that is not known."""

    text: str
    chunks: Sequence[str]
    starts: Sequence[int | None] = ()


@dataclass(frozen=True, slots=True)
class Situating:
    """How lines are written.

    Attributes:
        instructions: a text with ``{document}`` and, behind it, ``{chunk}``.
        max_tokens: of a line at most; what is longer ends there.
        at_once: chunks that are asked at once; those of one document always are, as far as the engine lets them wait.
    """

    instructions: str = INSTRUCTIONS
    max_tokens: int = MAX_TOKENS
    at_once: int = AT_ONCE

    def __post_init__(self) -> None:
        document, chunk = self.instructions.find("{document}"), self.instructions.find("{chunk}")
        if not 0 <= document < chunk:
            raise ConfigurationError(
                f"the instructions {self.instructions!r:.80} need a {{document}} and, behind it, a {{chunk}}: what "
                "stands before the document's end is computed once for all chunks"
            )

    def lines(self, engine: Engine, documents: Iterable[Chunked], **terms: Any) -> Iterator[list[str]]:
        """A line for each chunk of each of *documents*, in order; empty where the model had nothing to say.

        Greedy, so the same every time. Empty, too, where a chunk failed: the context does not hold it even with next to
        nothing of its document, or its request did not end well. The log says so once.

        Args:
            terms: on which requests are taken (``priority``, ``client``, ``timeout``).

        Raises:
            EngineClosed, DeviceLost: nobody gets a line any more.
        """
        group, size = list[Chunked](), 0
        failures = Failures()
        for document in documents:
            if group and size + len(document.chunks) > self.at_once:
                yield from self._ask(engine, group, terms, failures)
                group, size = [], 0
            group.append(document)
            size += len(document.chunks)
        yield from self._ask(engine, group, terms, failures)

    def _ask(
        self, engine: Engine, group: Sequence[Chunked], terms: dict[str, Any], failures: Failures
    ) -> Iterator[list[str]]:
        prompts = [self._prompts(engine, document, failures) for document in group]
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, stop=["\n\n"], seed=0)
        asked = [prompt for some in prompts for prompt in some if prompt is not None]
        submit = functools.partial(engine.submit_many, params=params, **terms)
        texts = list[str]()
        with Waves(submit, asked, engine.max_queued, len(asked)) as waves:
            while (request := waves.next()) is not None:
                texts.append(_line_of(request, failures))
        rest = iter(texts)
        for some in prompts:
            yield ["" if prompt is None else next(rest) for prompt in some]

    def _prompts(self, engine: Engine, document: Chunked, failures: Failures) -> list[list[int] | None]:
        """Each chunk behind the document, or behind its window: token ids that leave room for a line; ``None``: the
        context does not hold it."""
        text, chunks = document.text, document.chunks
        spans, size = spans_of(text, chunks, document.starts), len(text)
        most = engine.context_length - self.max_tokens
        alone: dict[int, list[int] | None] = {}  # the smallest window is as much as they leave room for

        def encode(number: int, size: int) -> tuple[list[int] | None, int]:
            ((start, end),) = windows_of(len(text), [spans[number]], size)
            try:
                ids = engine.encode(self._render(engine, text[start:end], chunks[number]))
            except PromptTooLong as error:
                if size <= _LEAST_CHARACTERS:
                    failures.add(error)
                return None, error.num_tokens
            return ids, len(ids)

        while True:
            prompts = dict(alone)
            for number in [number for number in range(len(chunks)) if number not in alone]:
                prompts[number], longest = encode(number, size)
                if longest <= most:
                    continue
                if size > _LEAST_CHARACTERS:
                    least, length = encode(number, _LEAST_CHARACTERS)
                    if length <= most:
                        break
                    prompts[number] = least
                alone[number] = prompts[number]
            else:
                return [prompts[number] for number in range(len(chunks))]
            if size == len(text):
                logger.info("a document of %d characters is shown in windows: the context does not hold it", size)
            size = max(_LEAST_CHARACTERS, int(size * min(_SHRINK, most / longest)))

    def _render(self, engine: Engine, document: str, chunk: str) -> Prompt:
        before, rest = self.instructions.split("{document}", 1)
        between, after = rest.split("{chunk}", 1)
        text = f"{before}{document}{between}{chunk}{after}"
        return [{"role": "user", "content": text}] if engine.has_chat_template else text


class Failures:
    """Chunks without a line: the first one is said in the log, and that there may be others."""

    def __init__(self) -> None:
        self._are_said = False

    def add(self, error: LayerStreamError) -> None:
        """One more, because of *error*."""
        if not self._are_said:
            self._are_said = True
            logger.warning("a chunk gets no line and keeps its text, as do others like it: %s", error)


def _line_of(request: Request, failures: Failures) -> str:
    """What was said; nothing, if that chunk's *request* failed."""
    try:
        return _first_line(request.result().text)
    except (EngineClosed, DeviceLost):
        raise
    except LayerStreamError as error:
        failures.add(error)
        return ""


def spans_of(document: str, chunks: Sequence[str], starts: Sequence[int | None] = ()) -> list[Span]:
    """Where each of *chunks* stands in *document*.

    Where *starts* does not say so, it is searched for behind the beginning of the one before; what is not found (a
    splitter may change white space) is taken to stand where its number among the chunks says.
    """
    spans, after = list[Span](), 0
    for number, chunk in enumerate(chunks):
        start = starts[number] if number < len(starts) else None
        if start is None:
            start = document.find(chunk.strip(), after)
        if not 0 <= start <= len(document):
            start = len(document) * number // len(chunks)
        after = start + 1
        spans.append((start, min(len(document), start + len(chunk))))
    return spans


def windows_of(length: int, spans: Sequence[Span], size: int) -> list[Span]:
    """For each of *spans* of a text of *length* the window of *size* that is shown with it.

    Windows begin at multiples of half their size, so that there are few, and neighbours have the same; each span is
    shown the one whose middle is nearest to its own. All are within the text, and as long as the text allows.
    """
    if size >= length:
        return [(0, length)] * len(spans)
    step, last = max(1, size // 2), length - size
    windows = []
    for start, end in spans:
        wanted = (start + end - size) / 2
        begin = min(max(0, round(wanted / step) * step), last)
        windows.append((begin, begin + size))
    return windows


def rejoin(pieces: Sequence[tuple[str, int | None]]) -> tuple[str, list[int]]:
    """The document that *pieces* were cut from, and where each of them begins in it.

    Args:
        pieces: texts, and where they began; overlaps count once, and gaps (white space that a splitter left out) are a
            line. Where one does not say, they are joined by empty lines in the order given.
    """
    if any(start is None for _, start in pieces):
        text, starts = "", list[int]()
        for piece, _ in pieces:
            text += "\n\n" if text else ""
            starts.append(len(text))
            text += piece
        return text, starts
    text, end, starts = "", 0, [0] * len(pieces)  # *end* in the document that they were cut from
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number][1] or 0):
        piece, start = pieces[number][0], pieces[number][1] or 0
        if text and start > end:
            text += "\n"
        overlap = min(max(0, end - start), len(text)) if text else 0
        if not text[len(text) - overlap :].startswith(piece[:overlap]):
            overlap = 0  # it began elsewhere: pages of a file that each count from 0
            text += "\n"
        starts[number] = len(text) - overlap
        text += piece[overlap:]
        end = max(end, start + len(piece))
    return text, starts


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
