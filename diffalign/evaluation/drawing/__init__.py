"""Sampling of images and videos for an evaluation, and the digest that names a pipeline."""
