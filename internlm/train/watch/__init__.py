"""What watches a run, and tells of it."""
