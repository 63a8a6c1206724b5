"""What a model family has to say for itself."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.types import Cond


@runtime_checkable
class Family(Protocol):
    """How prompts become conditions and how the network is called. One module per family implements it."""

    @property
    def name(self) -> str:
        """The name in the registry."""
        ...

    @property
    def network_name(self) -> str:
        """The pipeline component that is trained: ``unet`` or ``transformer``."""
        ...

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The pipeline components that encode prompts."""
        ...

    @property
    def load_arguments(self) -> Mapping[str, Any]:
        """Extra arguments of the pipeline's ``from_pretrained``."""
        ...

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of the real-size base model's components, by name."""
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
        """The network's raw prediction, shaped like ``x_t``."""
        ...

    def cond_shapes(self, network_config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions, without the batch axis."""
        ...


def encode_as_the_pipeline_does(pipeline: Any, prompts: list[str]) -> tuple[Any, ...]:
    """Call the stock ``encode_prompt`` where the text encoder lives, without guidance."""
    with torch.no_grad():
        result: tuple[Any, ...] = pipeline.encode_prompt(
            prompt=prompts,
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    return result


def negative_as_the_pipeline_does(pipeline: Any) -> tuple[Any, ...]:
    """The stock ``encode_prompt`` with guidance and no negative prompt, for one (empty) prompt."""
    with torch.no_grad():
        result: tuple[Any, ...] = pipeline.encode_prompt(
            prompt=[""],
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    return result
