"""Evaluation of aligned models: sampling, scoring, statistics and the report."""
