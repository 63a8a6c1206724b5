"""Prompts alone, wherever they come from; with their categories: `prompt_sets`."""

from diffalign.data.prompt_sets import read_prompt_set


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """The prompts of a file, of a published set or of what is built in, without empty ones.

    At most the first ``limit``. What ``path`` may be, and the errors, are `prompt_sets.read_prompt_set`'s.
    """
    return list(read_prompt_set(path, limit).prompts)
