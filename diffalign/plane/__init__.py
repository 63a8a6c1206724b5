"""A two-dimensional test problem with a known optimum, on which every method is tested in seconds."""
