"""The engine's thread: it takes requests in, runs sweeps, delivers answers, and decides whose an error is."""
