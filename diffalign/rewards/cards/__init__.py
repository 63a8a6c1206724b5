"""The cards of all rewards, one module for each kind of network. Importing them does not import torch."""

from diffalign.rewards.cards import blip, clips, edits, embedded, ensembles, language, latents, rules
from diffalign.rewards.cards.card import RewardCard

CARDS: tuple[RewardCard, ...] = (
    *embedded.CARDS,
    *clips.CARDS,
    *blip.CARDS,
    *language.CARDS,
    *edits.CARDS,
    *latents.CARDS,
    *rules.CARDS,
    *ensembles.CARDS,
)

__all__ = ["CARDS", "RewardCard"]
