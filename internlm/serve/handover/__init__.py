"""Handing a model over to other engines."""
