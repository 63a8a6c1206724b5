"""Is the aligned model better, by how much, at what price: sampling, scoring, statistics and the report."""
