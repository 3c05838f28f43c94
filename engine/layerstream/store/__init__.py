"""What outlives the process: pages of prefixes, and what was answered after them, on disk."""
