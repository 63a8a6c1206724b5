"""What language models behind rewards are told: the texts of their training, and which prompts fit."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> str:
    """Return the text that a published checkpoint was trained with, ``{text_prompt}`` where the prompt goes.

    Trailing spaces and blank lines are part of it.
    """
    return (_TEMPLATES / f"{name}.txt").read_bytes().decode()


def reserved(tokenizer: Any) -> list[str]:
    """Return the tokens of a tokenizer that are no words but its model's format.

    Not all that were added are: some tokenizers add blanks and tags that prompts may well hold.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *tokenizer.all_special_tokens})


def refuse_unreadable(name: str, prompts: Sequence[str], tokens: Iterable[str]) -> None:
    """UserError for an empty prompt, and for one that holds any of these tokens; ``name`` is the reward's."""
    for prompt in prompts:
        if not prompt.strip():
            raise UserError(f"reward {name!r}: an empty prompt; it judges by the prompt")
        token = next((token for token in tokens if token in prompt), None)
        if token is not None:
            raise UserError(
                f"reward {name!r}: the prompt {prompt!r} holds {token!r}, a token of the model's own format; "
                "take it out"
            )
