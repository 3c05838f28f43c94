"""Prompts to tokens, tokens to text."""
