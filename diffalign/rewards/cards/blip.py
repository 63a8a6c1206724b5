"""Cards of rewards on BLIP, whose text encoder cross-attends to the image."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="image_reward",
        title="ImageReward v1.0: what people ranked first of several images of a prompt",
        low=-2.3,
        high=2.2,
        scale_note="mean 0 and std 1 on its own data",
        licence="Apache-2.0",
        size="1.8 GB",
        checkpoint="THUDM/ImageReward",
        target="diffalign.rewards.zoo.image_reward:load",
        notes="BLIP-large and a linear head (arXiv 2304.05977); reads 35 tokens of the prompt. Downloaded: "
        "image_reward:FOLDER, image_reward:FILE@TOKENIZER.",
        differentiable=True,
        per_prompt=True,
    ),
)
