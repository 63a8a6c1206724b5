"""A given first frame: latents that the network of an image-to-video model sees clean at every time.

Such models (LTX-Video, Wan 2.2 TI2V) keep no other input for a source: the tokens of the first latent frame
are the source's, at time 0, and nothing is predicted there. Here the other frames alone are learned and
sampled as well, without a branch in losses and samplers: the clean sample has the source in its place, and
the prediction there is the velocity from the source to the noise, by which every sampler ends at the source
and whose error is 0. Errors are means over all latent frames, the first among them.
"""

from jaxtyping import Float, Num
from torch import Tensor, cat

from diffalign.diffusion.noising import expand
from diffalign.types import Cond, Target

NAME = "first_frame"
"""The name of the condition that holds the first latent frame, (B, C, 1, h, w)."""

SMALLEST = 1e-4  # time: below it the velocity is that at this time, since 0 has none


def with_source(x: Float[Tensor, "B C F h w"], cond: Cond) -> Float[Tensor, "B C F h w"]:
    """Return latents with the given first frame in place of their own."""
    return cat([cond[NAME].to(x), x[:, :, 1:]], 2)


def clean(x: Tensor, cond: Cond) -> Tensor:
    """Return clean samples (B, *d) as they are learned: with the given first frame, where one is given."""
    return with_source(x, cond) if NAME in cond else x


def token_times(model_time: Num[Tensor, " B"], frames: int, tokens: int) -> Num[Tensor, "B S"]:
    """Return the time of each token of ``frames`` latent frames of so many tokens: 0 in the first frame."""
    times = model_time[:, None].repeat(1, frames * tokens)
    times[:, :tokens] = 0
    return times


def known(prediction: Tensor, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond, target: Target) -> Tensor:
    """Return a network's prediction (B, *d) with that of a given first frame known: (x_t - source) / t.

    Args:
        prediction: the network's.
        x_t: what it is of, in the precision of the sampler or the loss.
        t: times in [0, 1] of a flow.
        cond: conditions; without a first frame among them nothing changes.
        target: what the network predicts.

    Raises:
        ValueError: a first frame, and no flow.
    """
    if NAME not in cond:
        return prediction
    if target != "flow":
        raise ValueError(f"a given first frame is for flows, and the network predicts {target}")
    own = x_t[:, :, :1]
    velocity = (own - cond[NAME].to(own)) / expand(t.clamp(min=SMALLEST), own).to(own)
    dtype = velocity.dtype if velocity.dtype.itemsize > prediction.dtype.itemsize else prediction.dtype
    return cat([velocity.to(dtype), prediction[:, :, 1:].to(dtype)], 2)
