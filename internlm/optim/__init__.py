"""Parameter groups, schedules, optimizers."""
