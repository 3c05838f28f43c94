"""The nouns that every floor shares: sequences, guesses, sweeps, constraints, sizes. Pure."""
