"""Transformers' own modules, run one row block at a time past streaming weights."""
