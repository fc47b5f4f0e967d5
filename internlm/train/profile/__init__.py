"""What a run does with its time and memory."""
