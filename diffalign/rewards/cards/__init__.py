"""The cards of all rewards, by what they stand on. Importing them imports no torch."""

from diffalign.rewards.cards import clips, embedded, rules
from diffalign.rewards.cards.card import RewardCard

CARDS: tuple[RewardCard, ...] = (*embedded.CARDS, *clips.CARDS, *rules.CARDS)

__all__ = ["CARDS", "RewardCard"]
