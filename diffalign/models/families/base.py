"""The interface of model families, and its shared parts."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.paths import token_line
from diffalign.errors import UserError
from diffalign.models.codecs import Codec
from diffalign.models.families.sources import NoSources, TakesSources
from diffalign.types import Cond


@runtime_checkable
class Family(TakesSources, Protocol):
    """The encoding of prompts and the call of the network. One module per family implements it."""

    @property
    def name(self) -> str:
        """The name in the registry."""
        ...

    @property
    def network_name(self) -> str:
        """The pipeline component that is trained: ``unet`` or ``transformer``."""
        ...

    @property
    def network_class(self) -> str:
        """Its class in diffusers."""
        ...

    @property
    def codec(self) -> Codec:
        """How its autoencoder is called."""
        ...

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The pipeline components that encode prompts, which every pipeline has."""
        ...

    @property
    def optional_encoders(self) -> tuple[str, ...]:
        """Further ones that a pipeline may lack."""
        ...

    @property
    def load_arguments(self) -> Mapping[str, Any]:
        """Extra arguments of the pipeline's ``from_pretrained``."""
        ...

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of the real-size base model's components, by name."""
        ...

    @property
    def keeps_length(self) -> Literal["token", "row"] | None:
        """Which parts of a guided prediction are as long as the prompt's own; None: guidance changes all."""
        ...

    @property
    def idle(self) -> tuple[str, ...]:
        """Parts of the names of weights that ``call`` makes no use of, and which stay as they are."""

    @property
    def token_order(self) -> tuple[str, ...]:
        """Tokenizers whose tokens, each padded to its limit, stand one after the other in the text that
        attention reads (``encoder_hidden_states``); () where a prompt's tokens stand elsewhere.
        """
        ...

    @property
    def masks_attention(self) -> bool:
        """Whether its network calls diffusers' dispatcher of attention with a mask, be it only for texts of
        unequal length: FlashAttention, which takes none, is refused.
        """
        ...

    @property
    def shares_tokens(self) -> bool:
        """Whether processes can share the tokens of a row (``training.context``): gradients over two are
        those of one. Diffusers 0.42.1 has plans for LTX-Video and LTX-2 too, which end in errors: of the
        text's mask, and of the rotary embedding.
        """
        ...

    @property
    def cuts_prompts(self) -> bool:
        """Whether its pipeline cuts a prompt to the number of its own tokens."""
        ...

    def configured(self, config: ModelConfig) -> "Family":
        """Return the family with the settings of a run's model section; itself where there are none."""
        ...

    def settle(self, pipeline: Any) -> None:
        """Put into a loaded pipeline's scheduler what the pipeline itself samples with in its stead."""

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """Channels of the latents that the network takes, before it packs them."""
        ...

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """Latents along one side of a patch: what the sides of latents must be multiples of."""
        ...

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return the component of the tokenizer with the longest limit, and its number of tokens."""
        ...

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Return (steps + 1,) descending float64 times at which a flow model's pipeline samples latents of
        this shape, ended by 0.
        """
        ...

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions, one row per prompt, float32."""
        ...

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Text conditions (n, ...) that the stock pipeline guides away from by default."""
        ...

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """Conditions made of sizes in pixels, (height, width) or (top, left)."""
        ...

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the network's raw prediction, shaped like ``x_t``."""
        ...

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions, without the batch axis, by the components' configurations."""
        ...


def present_encoders(family: Family, pipeline: Any) -> tuple[str, ...]:
    """Return the text encoders that a pipeline has."""
    optional = (name for name in family.optional_encoders if getattr(pipeline, name) is not None)
    return (*family.text_encoders, *optional)


def latent_shape(
    family: Family,
    vae_config: Mapping[str, Any],
    network_config: Mapping[str, Any],
    size: tuple[int, int],
    frames: int = 1,
    field: str = "data.resolution (or data.height and data.width)",
) -> tuple[int, ...]:
    """(C, h, w) of an image of ``size`` (height, width) in pixels, (C, F, h, w) of a video of so many frames.

    Raises:
        UserError: sides or frames that the model does not take.
    """
    codec = family.codec.fitted(network_config)
    multiple = codec.downscale(vae_config) * family.patch(network_config)
    if any(side < 1 or side % multiple for side in size):
        raise UserError(
            f"{field}: {size[0]} x {size[1]} pixels; allowed with {family.name}: multiples of {multiple}"
        )
    most = network_config.get("pos_embed_max_size")  # of SD3: positions along one side
    if most is not None and max(size) > most * multiple:
        raise UserError(
            f"{field}: {size[0]} x {size[1]} pixels; allowed with "
            f"this {family.name}: sides of at most {most * multiple}, for which it has position embeddings"
        )
    channels, (height, width) = codec.channels(vae_config), (s // codec.downscale(vae_config) for s in size)
    if not codec.video:
        return (channels, height, width)
    if frames < 1 or codec.usable_frames(vae_config, frames) != frames:
        nearest = codec.usable_frames(vae_config, frames) or next(
            n for n in itertools.count(1) if codec.usable_frames(vae_config, n)
        )
        raise UserError(f"data.frames={frames}; allowed with {family.name}: such as {nearest}")
    return (channels, codec.latent_frames(vae_config, frames), height, width)


def flow_grid(
    scheduler: Any, steps: int, tokens: int, own_sigmas: bool = False, mu: float | None = None
) -> Float[Tensor, " S"]:
    """Return (steps + 1,) descending float64 times of a diffusers flow scheduler, with its shift; the last is
    0.

    Args:
        scheduler: the pipeline's; it is not changed.
        steps: of the sampler.
        tokens: that the network makes of the latents, which a dynamic shift depends on.
        own_sigmas: whether the pipeline hands the scheduler sigmas evenly spaced from 1 to 1 / steps, as
            FLUX's does, in place of leaving them to it. A scheduler that has its own flow sigmas
            (``use_flow_sigmas``) is left to them by FLUX's, too.
        mu: of a dynamic shift; None: ``dynamic_mu``'s.
    """
    scheduler = copy.deepcopy(scheduler)
    own_sigmas = own_sigmas and not scheduler.config.get("use_flow_sigmas")
    arguments: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = dynamic_mu(scheduler.config, tokens) if mu is None else mu
    if own_sigmas:
        arguments["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(**arguments) if own_sigmas else scheduler.set_timesteps(steps, **arguments)
    grid = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)
    return torch.where(grid > 1 - 2e-6, 1.0, grid)  # UniPC's first is 1 - 1e-6, for its logarithms


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Return mu of a dynamic shift by exp(mu): by default the line (256 tokens, 0.5) to (4096, 1.15)."""
    return token_line(config, patch=1).at(tokens)


def rows(one: Cond, n: int) -> dict[str, Tensor]:
    """Return the conditions of one sample for ``n`` of them, (n, ...)."""
    return {name: value.expand(n, *value.shape[1:]) for name, value in one.items()}


def bare(network: nn.Module) -> Any:
    """Return the network itself, whose configuration can be read, without its distributed wrapper."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def encoded_by_pipeline(pipeline: Any, prompts: list[str], **arguments: Any) -> tuple[Any, ...]:
    """Return what the stock ``encode_prompt`` makes of prompts with these arguments, where the text encoder
    lives.
    """
    with torch.no_grad():
        result: tuple[Any, ...] = pipeline.encode_prompt(
            prompt=prompts, device=pipeline.text_encoder.device, **arguments
        )
    return result


class Usual(NoSources):
    """A base of families with common defaults, which a family overrides where it differs."""

    keeps_length: ClassVar[Literal["token", "row"] | None] = None
    token_order: ClassVar[tuple[str, ...]] = ()
    idle: ClassVar[tuple[str, ...]] = ()
    masks_attention: ClassVar[bool] = False
    shares_tokens: ClassVar[bool] = False
    cuts_prompts: ClassVar[bool] = False

    def configured(self, config: ModelConfig) -> Self:
        """Itself."""
        return self

    def settle(self, pipeline: Any) -> None:
        """Leave the scheduler alone."""

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """``in_channels``."""
        return int(network_config["in_channels"])

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """``patch_size``."""
        return int(network_config["patch_size"])

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Raise ValueError: variance-preserving families have DDIM's grid."""
        raise ValueError("a variance-preserving model is sampled on DDIM's grid")

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """None: the network is not told about sizes."""
        return {}
