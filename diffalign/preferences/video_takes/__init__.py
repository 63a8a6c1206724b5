"""Guided pairs: two takes of one real clip, alike in structure and unlike in what went wrong (DenseDPO, Wu et
al. 2025, arXiv 2506.03517, algorithm 2).

A clip's latents are noised part of the way, twice with other noise, and denoised again. The two videos that
come out show the same scene and motion, so a label says which one is better and not which one moves less.
"""
