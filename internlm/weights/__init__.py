"""A model's weights between formats."""
