"""Losses of likelihood ratios: unreduced functions of tensors that import torch only."""
