"""Dense labels: the better of two videos in each segment (DenseDPO, Wu et al. 2025, arXiv 2506.03517).

Labels come from a file of human labels, from rewards, or from a vision-language model.
"""
