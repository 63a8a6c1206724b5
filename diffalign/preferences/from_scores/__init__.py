"""Make preference pairs and ranked lists from scores, and write them to files."""
