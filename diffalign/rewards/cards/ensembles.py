"""Cards of rewards that combine other rewards."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="ensemble",
        title="A weighted sum of several rewards, listed in a file",
        scale_note="by its members",
        licence="its members'",
        size="its members'",
        checkpoint="",
        source="FILE.yaml",
        target="diffalign.rewards.ensemble:make",
        notes="ensemble:FILE.yaml with `members: [{reward: pickscore, weight: 0.5, mean: 21, std: 1}, ...]`; "
        "divide: 10 divides alone. Named after its file; the cache keeps its members' scores.",
        differentiable=True,
        cached=False,
        of_others=True,
    ),
)
