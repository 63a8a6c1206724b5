"""Cards of rewards that judge edits of a source image."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="edit_reward",
        title="EditReward: human preference between edits, by a Qwen2.5-VL-7B with two heads",
        scale_note="not published; trained on levels from 1 to 4",
        licence="unknown (weights), MIT (code)",
        size="16.6 GB",
        checkpoint="TIGER-Lab/EditReward-Qwen2.5-VL-7B",
        target="diffalign.rewards.zoo.edit_reward:load",
        notes="The mean of two scores at the token <|Reward|> (arXiv 2509.26346): how the prompt was "
        "followed and the quality of the edit; use bfloat16. Every prompt needs its source image. "
        "edit_reward:WEIGHTS@BASE has the Qwen2.5-VL elsewhere, as the weights of the other base need: "
        "edit_reward:TIGER-Lab/EditReward-MiMo-VL-7B-SFT-2508@XiaomiMiMo/MiMo-VL-7B-SFT-2508.",
        differentiable=True,
        edits=True,
    ),
    RewardCard(
        name="unified_reward_edit",
        title="UnifiedReward-Edit, local or behind an endpoint: points for an edit and its quality",
        low=0,
        high=1,
        licence="MIT (code)",
        size="17 GB (also 2b, 4b, 32b, and Qwen2.5-VL: unified_reward_edit:HUB/ID)",
        checkpoint="CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
        target="diffalign.rewards.zoo.unified_reward_edit:load",
        notes="Two published questions to a model of transformers in this process, or to "
        "unified_reward_edit:http://HOST:PORT/v1@MODEL: success and overediting, naturalness and artifacts, "
        "0 to 25; the geometric mean of the lower ones, divided by 25, as in VIEScore (arXiv 2312.14867). "
        "Every prompt needs its source image. An answer that cannot be read is counted and asked for again, "
        "and never a score.",
        edits=True,
    ),
)
