"""A base of families whose prompts are encoded to a number of tokens that the run may set."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.families.base import Usual, encoded_by_pipeline, rows


@dataclass(frozen=True)
class MaxSequenceLength(Usual, ABC):
    """A base of families whose stock ``encode_prompt`` takes ``max_sequence_length``: those of T5 and of
    language models.

    Attributes:
        max_sequence_length: tokens of a prompt, of T5 where there are several text encoders.
        text_encoders: see ``Family``.
        optional_encoders: see ``Family``.
        load_arguments: see ``Family``.
    """

    max_sequence_length: int = 512
    text_encoders: tuple[str, ...] = ("text_encoder",)
    optional_encoders: tuple[str, ...] = ()
    load_arguments: Mapping[str, Any] = field(default_factory=dict)

    most_tokens: ClassVar[int | None] = None
    """Maximal number of tokens in the stock pipeline; None: no limit."""

    def configured(self, config: ModelConfig) -> Self:
        """With the run's number of tokens.

        Raises:
            UserError: fewer than 1, or more than the pipeline reads.
        """
        tokens = text_tokens(config, self.max_sequence_length, self.most_tokens)
        return replace(self, max_sequence_length=tokens)

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return the first tokenizer."""
        return "tokenizer", self.max_sequence_length

    def encoded(self, pipeline: Any, prompts: list[str], **arguments: Any) -> tuple[Any, ...]:
        """Return what the stock ``encode_prompt`` makes of prompts, each of at most the family's tokens."""
        return encoded_by_pipeline(
            pipeline, prompts, max_sequence_length=self.max_sequence_length, **arguments
        )

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions, one row per prompt, float32."""

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt."""
        return rows(self.encode_prompts(pipeline, [""]), n)


def text_tokens(config: ModelConfig, usual: int, most: int | None = None) -> int:
    """Return the run's ``model.max_sequence_length``, or as many as the pipeline has by default.

    Raises:
        UserError: none, or more than ``most``, which the stock pipeline refuses.
    """
    if (tokens := config.max_sequence_length) is None:
        return usual
    if tokens < 1 or (most is not None and tokens > most):
        allowed = "1 or more" if most is None else f"1 to {most}"
        raise UserError(f"model.max_sequence_length={tokens}; allowed with this family: {allowed}, or null")
    return tokens
