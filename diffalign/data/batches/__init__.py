"""Batches: an encoded set served in a fixed order."""
