"""Memory, FLOPs and time of a run, known from its shapes before it is run."""
