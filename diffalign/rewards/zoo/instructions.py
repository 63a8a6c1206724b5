"""Instruction templates of rewards on language models, and checks of the prompts that go into them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> str:
    """Return the instruction that a published checkpoint was trained with.

    ``{text_prompt}`` stands for the prompt. Trailing spaces and blank lines are part of the text.
    """
    return (_TEMPLATES / f"{name}.txt").read_bytes().decode()


def reserved(tokenizer: Any) -> list[str]:
    """Return the special tokens of a tokenizer.

    Added tokens that are not special are left out: some tokenizers add blanks and tags that a prompt may
        hold.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *tokenizer.all_special_tokens})


def refuse_unreadable(name: str, prompts: Sequence[str], tokens: Iterable[str]) -> None:
    """Raise a UserError for an empty prompt or one that holds one of ``tokens``; ``name`` is the reward."""
    for prompt in prompts:
        if not prompt.strip():
            raise UserError(f"reward {name!r}: an empty prompt; it judges by the prompt")
        token = next((token for token in tokens if token in prompt), None)
        if token is not None:
            raise UserError(
                f"reward {name!r}: the prompt {prompt!r} holds {token!r}, a token of the model's own format; "
                "take it out"
            )
