"""Files → packed batches."""
