"""Weights: where files come from, and where they are kept."""
