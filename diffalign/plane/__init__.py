"""A two-dimensional laboratory with a known optimum, on which every method is proven in seconds."""
