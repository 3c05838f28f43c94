"""Floor 2: weights flow from the checkpoint's files through a fixed ring."""
