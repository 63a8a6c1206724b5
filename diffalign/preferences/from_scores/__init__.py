"""Preference pairs and ranked lists from scores: who is compared, who is left out and why, and the file."""
