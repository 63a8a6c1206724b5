"""Recognise the prompt syntax of A1111's and ComfyUI's interfaces, which pipelines read as plain text.

Weights (``(word:1.3)``, ``((word))``, ``[word]``), LoRA tags (``<lora:name:0.8>``), prompt editing
(``[cat:dog:0.5]``, ``[cat|dog]``) and the keyword ``BREAK``.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = r"(?:\d*\.\d+|[0-3])"
_SYNTAX = re.compile(
    rf"""
    (?<!\\)\([^()]*[^()\d\s:]\s*:\s*{_NUMBER}\s*\)  # (word:1.3), not (16:9) nor (at 10:30)
    | (?<!\\)\(\([^()]+\)\)                         # ((word))
    | \[\[[^\[\]]+\]\]                              # [[word]]
    | \[[^\[\]|:]*(?:\|[^\[\]|]*)+\]               # [cat|dog]
    | \[[^\[\]:]*:[^\[\]:]*:\s*{_NUMBER}\d*\s*\]    # [cat:dog:0.5]
    | (?<!\\)\[[a-z][a-z\ ,'-]{{2,}}\](?!\()          # [word], not [V], [1] nor a link
    | <(?:lora|lyco|locon|hypernet|hypernetwork|embedding):[^<>]+>
    | (?:^|[\s,])BREAK(?=[\s,]|$)
    """,
    re.VERBOSE,
)


def syntax_of(prompt: str) -> str:
    """Return the first piece of such syntax in a prompt, empty where there is none."""
    found = _SYNTAX.search(prompt)
    return found.group().strip(" ,\n") if found else ""


def empty_note(prompts: Sequence[str]) -> str:
    """Return a sentence on how many prompts are empty or blank; empty if none is."""
    empty = sum(not prompt.strip() for prompt in prompts)
    return f"{empty:,} of {len(prompts):,} prompts are empty" if empty else ""


def syntax_note(prompts: Iterable[str]) -> str:
    """Return a sentence on how many prompts have such syntax, with the first one; empty if none has."""
    total, marked, example = 0, 0, ""
    for prompt in prompts:
        total += 1
        if piece := syntax_of(prompt):
            marked += 1
            example = example or piece
    if not marked:
        return ""
    short = example if len(example) <= 60 else f"{example[:57]}..."
    return (
        f"{marked:,} of {total:,} prompts have weights or tags of A1111 or ComfyUI, such as {short!r}; they "
        "are read as plain text"
    )


_OF_LISTS = (
    (re.compile(r"#\s|//"), 1, "begin with # or //, as comments do"),
    (re.compile(r"([\"'\u201c]).+[\"'\u201d]$", re.DOTALL), 2, "are in quotation marks"),
    (re.compile(r"(?:\d+[.)]|[-*\u2022])\s"), 2, "begin with the number or the sign of a list"),
)
"""(beginning of a prompt, how many are no chance, what it looks like)."""


def notes_on(prompts: Sequence[str]) -> Iterator[str]:
    """Yield sentences on what the prompts of a list have that may not be meant as a part of them."""
    if note := syntax_note(prompts):
        yield note
    for pattern, least, words in _OF_LISTS:
        found = [prompt for prompt in prompts if pattern.match(prompt)]
        if len(found) >= least and (least == 1 or 2 * len(found) > len(prompts)):
            yield (
                f"{len(found):,} of {len(prompts):,} prompts {words}, such as {found[0][:60]!r}; they are "
                "read as they are"
            )
