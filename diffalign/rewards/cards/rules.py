"""Rewards that count: files, letters, things."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="jpeg",
        title="JPEG compressibility: minus the kilobytes at quality 95",
        range="-500 to 0, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.jpeg:compressibility",
        notes="DDPO's task (arXiv 2305.13301). Good for testing a pipeline; it says nothing of quality.",
        cached=False,
        reads_prompt=False,
    ),
    RewardCard(
        name="jpeg_incompressibility",
        title="JPEG incompressibility: the kilobytes at quality 95",
        range="0 to 500, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.jpeg:incompressibility",
        notes="The same with the other sign.",
        cached=False,
        reads_prompt=False,
    ),
)
