"""Reward models behind one call: ``load(spec)(images, prompts) -> (B,) float32``, higher is better.

Importing this package imports no torch; ``load`` does.
"""

from diffalign.rewards.registry import REGISTRY, RewardCard, load

__all__ = ["REGISTRY", "RewardCard", "load"]
