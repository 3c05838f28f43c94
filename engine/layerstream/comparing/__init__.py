"""The engine beside plain transformers, on a real model: where the first difference is."""
