"""Prompt files and published prompt sets."""
