"""People's labels: a table with a row for each segment that somebody has judged.

    pair,segment,label              video_0,video_1,segment,label
    0,0,first                       a-0.mp4,a-1.mp4,0,tie

Csv or json lines. A pair is named by its number in the file of pairs, from 0, or by its two files, in either
order. Segments count from 0. Several people may judge a segment: the majority counts, a draw is a tie.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.tables import json_rows
from diffalign.errors import UserError, unknown
from diffalign.segment_labels.pairs import Label, Pair

WORDS: Mapping[str, Label] = {
    **dict.fromkeys(("first", "a", "0", "left", "video_0"), "first"),
    **dict.fromkeys(("second", "b", "1", "right", "video_1"), "second"),
    **dict.fromkeys(("tie", "same", "equal", "0.5"), "tie"),
}
"""What people write, in any case."""

_TURNED: Mapping[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}


class ByFile:
    """Labels that are known. Segments that nobody has judged have none."""

    def __init__(self, path: str, pairs: Sequence[Pair]):
        """Reads the table; UserError naming the row for a pair, a segment or a label that there is not."""
        self._votes: dict[tuple[int, int], Counter[Label]] = defaultdict(Counter)
        self._number = {id(pair): number for number, pair in enumerate(pairs)}
        names = {tuple(path.name for path in pair.paths): number for number, pair in enumerate(pairs)}
        for where, row in _rows(path):
            number, turned = _pair_of(row, where, names, len(pairs))
            label = _label(row, where)
            self._votes[number, _whole(row, "segment", where)][_TURNED[label] if turned else label] += 1

    @property
    def by(self) -> str:
        """Who labels."""
        return "people"

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """A label a segment."""
        number = self._number[id(pair)]
        return [_winner(self._votes.get((number, segment))) for segment in range(count)]


def _winner(votes: Counter[Label] | None) -> Label:
    if not votes:
        return None
    (label, most), *others = votes.most_common()
    return "tie" if others and others[0][1] == most else label


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix not in (".csv", ".jsonl", ".json"):
        raise UserError(f"--labels {path!r}: no such file; allowed: a .csv or .jsonl file")
    if file.suffix != ".csv":
        yield from json_rows(file)
        return
    with file.open(newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.DictReader(lines)):
            yield f"{file.name} row {number}", row


def _pair_of(
    row: Mapping[str, Any], where: str, names: Mapping[tuple[str, ...], int], pairs: int
) -> tuple[int, bool]:
    """(number of the pair, whether the row has it the other way round)."""
    if row.get("pair") not in (None, ""):
        number = _whole(row, "pair", where)
        if number >= pairs:
            raise UserError(f"{where}: pair is {number}; allowed: 0 to {pairs - 1}")
        return number, False
    if row.get("video_0") is None or row.get("video_1") is None:
        raise UserError(f"{where}: found {', '.join(row)}; needed pair (or video_0, video_1), segment, label")
    given = tuple(Path(str(row[name])).name for name in ("video_0", "video_1"))
    for turned, key in ((False, given), (True, given[::-1])):
        if key in names:
            return names[key], turned
    raise UserError(f"{where}: no pair of {' and '.join(given)}")


def _whole(row: Mapping[str, Any], name: str, where: str) -> int:
    text = str(row.get(name, "")).strip()
    if not text.isdecimal():
        raise UserError(f"{where}: {name} is {row.get(name)!r}; allowed: a whole number from 0 on")
    return int(text)


def _label(row: Mapping[str, Any], where: str) -> Label:
    word = str(row.get("label", "")).strip().casefold()
    if word not in WORDS:
        raise unknown(f"label in {where}", row.get("label"), WORDS)
    return WORDS[word]
