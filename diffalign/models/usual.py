"""What many families answer alike, and those among them whose prompts a T5 reads."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.config import ModelConfig
from diffalign.errors import UserError
from diffalign.models.family import rows


class Usual:
    """Answers that many families share: a base for them, which replace what is otherwise with them."""

    def configured(self, config: ModelConfig) -> Self:
        """Itself."""
        return self

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """``in_channels``."""
        return int(network_config["in_channels"])

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """``patch_size``."""
        return int(network_config["patch_size"])

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Never asked: variance-preserving families have DDIM's grid.

        Raises:
            ValueError: it was.
        """
        raise ValueError("a variance-preserving model is sampled on DDIM's grid")

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """None: the network is not told about sizes."""
        return {}


@dataclass(frozen=True)
class ReadByT5(Usual, ABC):
    """What families share whose prompts a T5 reads.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    max_sequence_length: int = 512

    most_tokens: ClassVar[int | None] = None
    """What the stock pipeline refuses to exceed; None: nothing."""

    def configured(self, config: ModelConfig) -> Self:
        """With the run's number of T5 tokens.

        Raises:
            UserError: fewer than 1, or more than the pipeline reads.
        """
        tokens = text_tokens(config, self.max_sequence_length, self.most_tokens)
        return replace(self, max_sequence_length=tokens)

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """T5's tokenizer."""
        return "tokenizer", self.max_sequence_length

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions, one row per prompt, float32."""

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """The encoded empty prompt."""
        return rows(self.encode_prompts(pipeline, [""]), n)


def text_tokens(config: ModelConfig, usual: int, most: int | None = None) -> int:
    """Tokens of a T5: the run's ``model.max_sequence_length``, or as many as the pipeline has by default.

    Raises:
        UserError: none, or more than ``most``, which the stock pipeline refuses.
    """
    tokens = config.max_sequence_length
    if tokens is None:
        return usual
    if tokens < 1 or (most is not None and tokens > most):
        allowed = "1 or more" if most is None else f"1 to {most}"
        raise UserError(f"model.max_sequence_length={tokens}; allowed with this family: {allowed}, or null")
    return tokens


def encoded_by_t5(pipeline: Any, prompts: list[str], tokens: int) -> tuple[Any, ...]:
    """What the stock ``encode_prompt`` makes of so many tokens where T5 is the only text encoder, without
    guidance.
    """
    with torch.no_grad():
        result: tuple[Any, ...] = pipeline.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=tokens,
            device=pipeline.text_encoder.device,
        )
    return result
