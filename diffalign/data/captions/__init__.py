"""Captions altered for methods that compare prompts of one image."""
