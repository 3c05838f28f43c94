"""Chats: messages to a prompt, tools to a grammar, and what the model says back to text, thoughts and tool calls."""
