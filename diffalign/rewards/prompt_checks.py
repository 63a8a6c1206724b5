"""Rewards that cannot score every prompt say so before there are images."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that cannot score every prompt, or wraps others that may be such."""

    def check_prompts(self, prompts: Sequence[str], /) -> None:
        """Raise a UserError for prompts that cannot be scored."""
        ...


def check_prompts(reward: object, prompts: Sequence[str]) -> None:
    """Raise a UserError for prompts that a reward says it cannot score; most rewards score all."""
    if isinstance(reward, ChecksPrompts):
        reward.check_prompts(prompts)
