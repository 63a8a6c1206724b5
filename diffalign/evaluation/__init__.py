"""Is the aligned model better, by how much, and at what price: sampling, scoring, statistics and the report."""
