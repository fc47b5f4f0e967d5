"""Distribution, applied from outside to a plain model."""
