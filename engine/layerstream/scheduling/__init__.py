"""Which rows go into the next sweep, and which tokens come out of it."""
