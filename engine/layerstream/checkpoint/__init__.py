"""Weights are read where they lie; only headers are read at open."""
