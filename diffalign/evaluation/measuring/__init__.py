"""Measurements of generated images and videos: rewards, image statistics, motion, confidence intervals."""
