"""Documents, questions and a retriever: what ``layerstream demo`` and ``layerstream ask`` are made of."""

TOY_ANSWERS = (
    "the bundled 3.5 MiB toy answers: it finds short answers in a text of the prompt and knows nothing else; name a "
    "model for more"
)
"""Said where nobody may have meant the bundled reader."""
