"""Plain arithmetic about a model on hardware; no tensors."""
