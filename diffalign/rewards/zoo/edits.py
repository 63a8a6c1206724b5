"""Prompts of rewards that judge edits: each has the source image that was edited."""

from collections.abc import Sequence

from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt, sources_of


def edits_of(name: str, prompts: Sequence[str]) -> list[SourcedPrompt]:
    """Return the prompts with their source images; ``name`` is the reward.

    Raises:
        UserError: prompts without a source.
    """
    sourced = sources_of(prompts)
    if len(sourced) < len(prompts):
        raise UserError(
            f"reward {name!r} judges edits, and the prompt {prompts[0]!r} has no source image; allowed: a "
            "prompt set or a table with a column of it (source, path_src, ...), or another reward"
        )
    return sourced
