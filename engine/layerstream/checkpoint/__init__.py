"""Floor 1: weights are read where they lie; only headers are read at open."""
