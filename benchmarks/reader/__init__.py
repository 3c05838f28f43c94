"""Makes the bundled reader: facts, prompts, tokenizer, training, evaluation."""
