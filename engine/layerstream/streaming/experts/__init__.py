"""Experts as they are routed to: which are there, which come, and where they are computed."""
