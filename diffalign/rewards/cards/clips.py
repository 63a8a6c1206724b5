"""Rewards over a CLIP: what people preferred, what fits the prompt, what is handsome."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="pickscore",
        title="PickScore v1: what users of Pick-a-Pic preferred",
        range="17 to 24 (SD1.5 about 20.5, SDXL about 22)",
        licence="MIT",
        size="3.9 GB",
        checkpoint="yuvalkirstain/PickScore_v1",
        target="diffalign.rewards.pickscore:load",
        notes="CLIP ViT-H/14, exp(logit_scale) * cos(text, image) (arXiv 2305.01569).",
        differentiable=True,
        per_prompt=True,
    ),
    RewardCard(
        name="step_aware",
        title="SPO's step-aware preference model: judges clean estimates at noisy times as well",
        range="as PickScore",
        licence="MIT (PickScore); the published weights name none",
        size="about 5 GB",
        checkpoint="SPO-Diffusion-Models/Step-Aware_Preference_Models",
        target="diffalign.rewards.step_aware:load",
        notes="step_aware:sd15, step_aware:sdxl, step_aware:tiny (built in, of the tiny SDXL), or "
        "step_aware:FOLDER of `diffalign train-reward` (arXiv 2406.04314). Finished images are at time 0.",
        differentiable=True,
        per_prompt=True,
    ),
    RewardCard(
        name="aesthetic_v2",
        title="LAION aesthetic predictor v2 (improved-aesthetic-predictor)",
        range="1 to 10 (SD1.5 about 5.4, SDXL above 6)",
        licence="Apache-2.0 (head), MIT (CLIP L/14)",
        size="3.7 MB + 1.7 GB",
        checkpoint="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        target="diffalign.rewards.aesthetic:load_v2",
        notes="Affine in the unit CLIP L/14 embedding, so easily hacked. The prompt is not read.",
        differentiable=True,
        reads_prompt=False,
    ),
    RewardCard(
        name="aesthetic_v1",
        title="LAION aesthetic predictor v1 (linear)",
        range="0 to 10",
        licence="MIT (head), MIT (CLIP)",
        size="4 KB + 1.7 GB",
        checkpoint="",
        target="diffalign.rewards.aesthetic:load_v1",
        notes="Give a head of LAION-AI/aesthetic-predictor: aesthetic_v1:/x/sa_0_4_vit_l_14_linear.pth.",
        differentiable=True,
        reads_prompt=False,
    ),
)
