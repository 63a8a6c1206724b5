"""Who is better, second by second: labels for the segments of two videos, from a file of people's, from
rewards, or from a vision-language model (DenseDPO, Wu et al. 2025, arXiv 2506.03517).
"""
