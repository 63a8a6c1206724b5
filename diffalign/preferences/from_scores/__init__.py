"""Preference pairs and ranked lists from scores, and the files that hold them."""
