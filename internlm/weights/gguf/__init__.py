"""GGUF files, both ways."""
