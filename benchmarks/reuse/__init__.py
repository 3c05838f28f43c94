"""What of a prompt was read before, and what of it is reused: the pipelines that people build, beside the ideal."""
