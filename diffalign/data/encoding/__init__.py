"""Encoding: images, videos and prompts to latents and embeddings, kept in a cache."""
