"""Strings ⇄ ids: tokenizers, chat formats."""
