"""Decide which samples to remove, from their forgetting, and explain the decision."""
