"""Model families of Transformers."""
