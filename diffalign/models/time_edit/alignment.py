"""Which token of the destination prompt stands for which token of the source prompt.

Where every source token occurs in the destination in its order ("a pack of roses", "a pack of blue roses")
the alignment is TIME's released one: each source token goes to the next equal token, "an" counting as "a".
Elsewhere the released loop ends with an IndexError; here equal runs (the longest common ones) are anchors,
and the source tokens between two anchors share the destination's tokens between them in order: "red" of "red
circle" goes to "blue" of "blue circle". Source tokens for which the destination has nothing between the
anchors (a word that is left out) go to the next anchor.

Beyond the source's end, as released, the remaining destination positions follow one by one, the last one
repeated: prompts are padded, and the padding of a causal text encoder has read the prompt too.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher

from diffalign.errors import UserError


def align(source: Sequence[int], destination: Sequence[int], length: int) -> list[int]:
    """Return the destination position of each of the ``length`` source positions.

    Args:
        source: token ids of the source prompt, with its begin and end tokens, without padding.
        destination: those of the destination prompt.
        length: positions of a padded prompt.

    Raises:
        UserError: a prompt without tokens, or with more than ``length``.
    """
    for name, ids in (("source", source), ("destination", destination)):
        if not 1 <= len(ids) <= length:
            raise UserError(f"the {name} prompt has {len(ids)} tokens; allowed: 1 to {length}")
    found = _subsequence(source, destination) or _by_anchors(source, destination)
    rest = range(found[-1] + 1, found[-1] + 1 + length - len(source))
    return [*found, *(min(position, length - 1) for position in rest)]


def _subsequence(source: Sequence[int], destination: Sequence[int]) -> list[int] | None:
    """Return the next equal token of each source token, left to right; None where one has none."""
    found: list[int] = []
    for token in source:
        start = found[-1] + 1 if found else 0
        place = next((i for i in range(start, len(destination)) if destination[i] == token), None)
        if place is None:
            return None
        found.append(place)
    return found


def _by_anchors(source: Sequence[int], destination: Sequence[int]) -> list[int]:
    """Return the alignment where some source tokens are not in the destination."""
    found: list[int] = []
    matcher = SequenceMatcher(None, source, destination, autojunk=False)
    for _, start, end, low, high in matcher.get_opcodes():
        for number in range(end - start):
            if high > low:
                found.append(low + number * (high - low) // (end - start))
            else:
                found.append(min(low, len(destination) - 1))
    return found
