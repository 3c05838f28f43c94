"""Floor 5: prompts to tokens, tokens to text."""
