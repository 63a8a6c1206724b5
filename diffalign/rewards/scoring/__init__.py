"""Scoring of files and records with rewards, and the cache of scores."""
