"""Chatting: in the terminal, with a model here or behind a URL."""
