"""Floor 3: the keys and values of every sequence, in pages."""
