"""A base of families whose prompts a language model encodes as a user's message in its chat template."""

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.families.base import bare
from diffalign.models.families.max_sequence_length import MaxSequenceLength

QWEN3_4B = {
    "architectures": ["Qwen3Model"],
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
"""Qwen/Qwen3-4B."""


@dataclass(frozen=True)
class ReadByChat(MaxSequenceLength, ABC):
    """A family with one language model as its text encoder.

    Attributes:
        max_sequence_length: tokens, those of the template among them.
    """

    thinking: ClassVar[bool] = True
    """The pipeline's setting of the template for thinking."""

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return the language model's tokenizer; the tokens that its template leaves to the prompt."""
        return "tokenizer", self.max_sequence_length - template_tokens(pipeline.tokenizer, self.thinking)


def template_tokens(tokenizer: Any, thinking: bool) -> int:
    """Return the number of tokens of a chat template around an empty user's message."""
    message = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return len(tokenizer(text).input_ids)


def padded(
    states: list[Float[Tensor, "_ D"]], tokens: int
) -> tuple[Float[Tensor, "B tokens D"], Float[Tensor, "B tokens"]]:
    """Return states of several lengths as (B, tokens, D), zeros behind them, and their mask (B, tokens),
    float32.
    """
    lengths = torch.tensor([len(one) for one in states], device=states[0].device)
    mask = (torch.arange(tokens, device=lengths.device) < lengths[:, None]).float()
    full = torch.zeros(len(states), tokens, states[0].shape[-1], device=lengths.device)
    for row, one in zip(full, states, strict=True):
        row[: len(one)] = one
    return full, mask


def text_multiple(network: nn.Module) -> int:
    """Return what a text's number of tokens must be a multiple of: 1, or the processes that share them."""
    config = getattr(bare(network), "_parallel_config", None)
    return 1 if config is None else int(config.context_parallel_config.ulysses_degree)


def lengths_of(mask: Float[Tensor, "B N"]) -> list[int]:
    """Return the number of tokens of each prompt; on the meta device, which holds no values, all of them."""
    if mask.is_meta:
        return [mask.shape[1]] * len(mask)
    return [int(length) for length in mask.sum(1).tolist()]
