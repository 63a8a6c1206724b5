"""Rewards over HTTP: server and client."""
