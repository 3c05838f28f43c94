"""Guesses at what comes next, from the prompt, from earlier answers, from a small model; merged into one tree."""
