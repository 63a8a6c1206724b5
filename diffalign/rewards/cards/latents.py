"""Cards of rewards on a diffusion model, which score latents, noisy ones included."""

from diffalign.rewards.cards.card import RewardCard

CARDS = (
    RewardCard(
        name="latent_reward",
        title="LPO's latent reward model: judges noisy latents by the diffusion model itself",
        scale_note="exp(logit_scale) * cos: compare one model's scores of one prompt",
        licence="MIT",
        size="about 4 GB (sd15) or 14 GB (sdxl), and the base model's autoencoder",
        checkpoint="casiatao/LRM",
        source="sd15",
        target="diffalign.rewards.zoo.latent_reward:load",
        notes="latent_reward:sd15, latent_reward:sdxl, or a downloaded latent_reward:FOLDER@BASE (arXiv "
        "2502.01051). Finished images are encoded and at time 0; from Python, reward.of_latents(latents, "
        "prompts, t) judges noisy ones.",
        differentiable=True,
        per_prompt=True,
    ),
)
