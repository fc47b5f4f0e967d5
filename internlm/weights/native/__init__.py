"""Training checkpoints of InternLM v0.2 and InternEvo."""
