"""One engine for chat, serving, evaluation and rollouts."""
