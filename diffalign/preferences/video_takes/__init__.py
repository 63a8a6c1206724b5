"""Guided pairs: two takes of one real clip (DenseDPO, Wu et al. 2025, arXiv 2506.03517, algorithm 2).

A clip's latents are partially noised, twice with different noise, and denoised again. Both takes show the
same scene and motion and differ in their artefacts, so a label does not favour the video with less motion.
"""
