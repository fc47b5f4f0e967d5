"""A run before it is started."""
