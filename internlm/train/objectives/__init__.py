"""Objectives: pure functions from outputs and batch to a sum."""
