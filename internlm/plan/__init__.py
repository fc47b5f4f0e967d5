"""A run before it is started: the real step without the machines."""
