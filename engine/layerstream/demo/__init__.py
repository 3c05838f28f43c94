"""Documents, questions and a retriever: what ``layerstream demo`` and ``layerstream ask`` are made of."""
