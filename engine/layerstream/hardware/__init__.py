"""What the machine has: files, memory, processors and accelerators. Knows no model."""
