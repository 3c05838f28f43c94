"""How a query and a passage become a prompt whose next token says whether the passage is of use.

A form is a row of pieces. Each is encoded by itself, as the models were trained, and what is shared by prompts is what
stands before the first piece with ``{passage}``: with the query first, a query's prompts share it; with the passage
first, its KV is there for the next query, also after a restart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.errors import ConfigurationError

_PLACE = re.compile(r"\{(instruction|query|passage)\}")
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class RerankForm:
    """A prompt of *pieces*, where ``{instruction}``, ``{query}`` and ``{passage}`` stand for themselves.

    Attributes:
        tokens: one or two texts, of which the first tokens count: the first text says yes. A score is its share of
            both, or what the logistic function makes of its logit.
        instruction: what the model is told to look for, if nobody says otherwise.
        is_chat: the pieces are what a user says in the model's own chat template.
        models: parts of the names of models that it belongs to, in lower case.

    Raises:
        ConfigurationError: no piece with the query, or none with the passage.
    """

    pieces: Sequence[str]
    tokens: Sequence[str] = ("yes", "no")
    instruction: str = _INSTRUCTION
    is_chat: bool = False
    models: Sequence[str] = ()

    def __post_init__(self) -> None:
        whole = "".join(self.pieces)
        if isinstance(self.pieces, str) or "{query}" not in whole or whole.count("{passage}") != 1:
            raise ConfigurationError(
                f"the pieces of a form are texts with {{query}} and, once, {{passage}}; found {self.pieces!r:.80}"
            )
        if isinstance(self.tokens, str) or not 1 <= len(self.tokens) <= 2:
            raise ConfigurationError(f"a form's tokens are one or two texts, not {self.tokens!r}")

    @property
    def is_passage_first(self) -> bool:
        """Whether the passage stands before the query, so that its KV is worth keeping."""
        whole = "".join(self.pieces)
        return whole.index("{passage}") < whole.index("{query}")


def fill(piece: str, **values: str) -> str:
    """*piece* with *values* in their places; what looks like a place within a value is none."""
    return _PLACE.sub(lambda found: values[found[1]], piece)


QWEN3 = RerankForm(
    pieces=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    models=("qwen3-reranker",),
)
"""Of Qwen3-Reranker."""

BGE_GEMMA = RerankForm(
    pieces=(
        "A: {query}",
        "\n",
        "B: {passage}",
        "\n",
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'.",
    ),
    tokens=("Yes",),
    models=("bge-reranker-v2-gemma",),
)
"""Of bge-reranker-v2-gemma."""

CHAT = RerankForm(
    pieces=(
        "Passage: {passage}\n\n",
        "Query: {query}\n\n{instruction} Answer with yes or no.",
    ),
    instruction="Does the passage answer the query?",
    is_chat=True,
)
"""For any model that answers: the passage first, so that it is computed once for all queries."""

FORMS = (QWEN3, BGE_GEMMA)


def form_of(model: str) -> RerankForm:
    """The form that *model* was trained with, by its name; :data:`CHAT` for others."""
    name = model.lower()
    return next((form for form in FORMS if any(part in name for part in form.models)), CHAT)
