"""PatchDPO. Huang et al. 2025, "PatchDPO: Patch-level DPO for Finetuning-free Personalized Image Generation",
CVPR 2025, arXiv 2412.03177.

In spite of its name it has no DPO loss: no reference, no sigmoid and no negative term. With w a weight map
over the latent's patches,

    loss = mean( w (eps_hat - eps)^2 ),    w = 1 - map for reference images, map for generated ones.

A pair is a reference image of the subject (score 1) and a generated one (score 0), at the same time and with
the same noise. Maps are ``batch.extra["patches"]``, (B, 1, *spatial), computed before training: the map of a
generated image is the quality of each patch (in the paper its largest cosine similarity with a patch of the
reference), so that bad patches have a small weight.

The released code trains the adapter modules of an IP-Adapter-Plus on SDXL; any network can be trained here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import denoising_error
from diffalign.errors import UserError
from diffalign.methods._base import StateMethod
from diffalign.methods._common import noisy
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class PatchDPO(StateMethod):
    """Denoising loss with a weight per patch.

    Attributes:
        noising: map from clean latents to noisy states; the members of a pair share the noise.
    """

    needs_reference: ClassVar[bool] = False
    extras: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the weighted mean error of the policy over all samples; ``reference`` is not called.

        Raises:
            UserError: the batch has no maps, or maps of another size than its latents.
        """
        weights = patch_weights(batch)
        z = noisy(self, policy, reference, batch, generator)
        errors = denoising_error(policy, z, batch.cond, lambda squared: self.reduce(weights * squared))
        loss = errors.mean()
        return Step(loss, {"loss": loss.detach()}, errors.new_full((), errors.numel()))


def patch_weights(batch: Batch[Tensor]) -> Tensor:
    """Return weights (B, 1, *spatial): 1 - map for reference images (score above 1/2), otherwise the map."""
    maps = batch.extra.get("patches")
    expected = (len(batch.x), 1, *batch.x.shape[2:])
    if maps is None or tuple(maps.shape) != expected:
        given = "no maps" if maps is None else f"maps of shape {tuple(maps.shape)}"
        raise UserError(
            f"patchdpo: the data has {given}; allowed: weight maps in [0, 1] with each image, {expected}"
        )
    is_reference = batch.score.reshape(-1, *(1,) * (maps.ndim - 1)) > 0.5
    return torch.where(is_reference, 1 - maps, maps)


CARD = MethodCard(
    name="patchdpo",
    title="PatchDPO",
    paper="Huang et al., PatchDPO: Patch-level DPO for Finetuning-free Personalized Image Generation",
    year=2025,
    arxiv="2412.03177",
    data=DataKind.PATCHED_PAIRS,
    cost="2 policy samples with gradient",
    method=PatchDPO,
)
