"""Readers: preference sets in the formats that people have, to examples."""
