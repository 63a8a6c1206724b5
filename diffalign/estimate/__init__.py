"""Estimate memory, FLOPs and time of a run from shapes, before it runs."""
