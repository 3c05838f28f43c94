"""Floor 4: transformers' own modules, run one row block at a time past streaming weights."""
