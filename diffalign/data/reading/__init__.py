"""Readers of preference sets in common formats, to examples."""
