"""Whole jobs: a configuration is checked, assembled, trained, validated and saved."""
