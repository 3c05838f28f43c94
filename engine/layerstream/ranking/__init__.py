"""Texts to vectors, passages to scores: what embedding models and rerankers want around an engine."""
