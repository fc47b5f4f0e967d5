"""Model families of Transformers: their config.json and names of weights."""
