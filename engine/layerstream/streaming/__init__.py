"""Weights flow from the checkpoint's files through a fixed ring."""
