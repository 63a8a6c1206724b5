"""Wrong captions by replacing one word, offline and deterministic by caption and seed.

The principle, the word and its replacement are drawn by (seed, caption): every principle that the caption
allows is equally likely, however many words it has of each. Articles, plurals and capitals follow the new
word. A caption without a word of the lexicon gives None; it is left out and counted, since a nonsense caption
would only train against nonsense.

Captions of the drawn scenes get words of the drawn scenes, and never a caption that is still true (an object
left of its equal is also right of it).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from diffalign.data.captions.lexicon import ENGLISH, GREY, Group, Principle, plural_of
from diffalign.diffusion.randomness import derive
from diffalign.tiny import scenes

VERSION = 1  # version of the words and of the draws
_AFTER = re.compile(
    "of|on|in|at|and|or|with|by|to|from|is|are|was|were|for|under|over|near|next|behind|above|below|the|an?|"
    "that|which|as|into",
    re.IGNORECASE,
)
"""Words before which a modifier has another meaning."""

_MODIFIERS = frozenset({"orange"})  # a colour before a noun, a fruit otherwise
_PRONOUN = re.compile(r"\b(he|she|his|her|him|hers|himself|herself)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)
_SOUNDS_VOWEL = re.compile(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest", re.IGNORECASE)


@dataclass(frozen=True)
class Edit:
    """One replacement: the span of a word in a caption, and its possible replacements."""

    principle: Principle
    start: int
    end: int
    others: tuple[str, ...]


@dataclass(frozen=True)
class Swap:
    """Replaces one word of a caption; None if no word can be replaced. See the module."""

    seed: int = 0

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever a result may."""
        return f"swap {VERSION} {self.seed}"

    def __call__(self, caption: str) -> str | None:
        """Return the altered caption."""

        def draw(what: str, n: int) -> int:
            return derive(self.seed, "swap", what, caption) % n

        edits = list(edits_of(caption))
        principles = sorted({edit.principle for edit in edits})
        if not principles:
            return None
        principle = principles[draw("principle", len(principles))]
        among = [edit for edit in edits if edit.principle == principle]
        edit = among[draw("word", len(among))]
        return replaced(caption, edit, edit.others[draw("other", len(edit.others))])


def edits_of(caption: str) -> Iterator[Edit]:
    """Return every possible replacement in a caption."""
    scene = _is_scene(caption)
    pattern, table = _index(_scene_groups() if scene else ENGLISH)
    for match in pattern.finditer(caption):
        group, others = table[match[0].lower()]
        edit = Edit(group.principle, *match.span(), others)
        if scene:
            kept = tuple(o for o in others if not scenes.same(caption, replaced(caption, edit, o)))
            edit = Edit(edit.principle, edit.start, edit.end, kept)
        if edit.others and _fits(caption, match, group):
            yield edit


def replaced(caption: str, edit: Edit, word: str) -> str:
    """Return the caption with another word at the place of an edit, with its article and capitals adapted."""
    before, old, after = caption[: edit.start], caption[edit.start : edit.end], caption[edit.end :]
    if old.isupper() and len(old) > 1:
        word = word.upper()
    elif old[0].isupper():
        word = word[0].upper() + word[1:]
    if article := _ARTICLE.search(before):
        new = "an" if _SOUNDS_VOWEL.match(word) else "a"
        if article[1][0].isupper():
            new = new.upper() if word.isupper() else new.capitalize()
        before = before[: article.start()] + new + article[2]
    return before + word + after


def _fits(caption: str, match: re.Match[str], group: Group) -> bool:
    """Return whether a word has its group's meaning here."""
    if group.gendered and _PRONOUN.search(caption):
        return False
    if not group.modifier and match[0].lower() not in _MODIFIERS:
        return True
    following = re.match(r"\s+([a-z]+)", caption[match.end() :], re.IGNORECASE)
    modifies = following is not None and not _AFTER.fullmatch(following[1])
    return modifies or (group.modifier and re.search(r"\bof\s+$", caption[: match.start()]) is not None)


Table = dict[str, tuple[Group, tuple[str, ...]]]


@lru_cache(maxsize=2)
def _index(groups: Sequence[Group]) -> tuple[re.Pattern[str], Table]:
    """Return a pattern of all words, longest first, and each word's group with the words that may replace
    it.
    """
    table: Table = {}
    for group in groups:
        for inflect in (str, plural_of) if group.plural else (str,):
            forms = [inflect(word) for word in group.words]
            for form in forms:
                table.setdefault(form, (group, tuple(other for other in forms if other != form)))
    if "gray" in table:
        table.update(dict.fromkeys(GREY, table["gray"]))
    words = sorted(table, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])", re.IGNORECASE), table


def _is_scene(caption: str) -> bool:
    try:
        scenes.parse_things(caption)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1)
def _scene_groups() -> tuple[Group, ...]:
    return (
        Group("content", tuple(scenes.SHAPES)),
        Group("attribute", tuple(scenes.COLORS)),
        Group("attribute", tuple(scenes.SIZES)),
        Group("spatial", tuple(scenes.RELATIONS)),
    )
