"""What fits five minutes of a card: stages, each in a process of its own, and the table that they make."""
