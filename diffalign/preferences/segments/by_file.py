"""Human labels: a table with a row for each judged segment.

    pair,segment,label              video_0,video_1,segment,label
    0,0,first                       a-0.mp4,a-1.mp4,0,tie

Csv or json lines. A pair is named by its number in the file of pairs, from 0, or by its two files, in either
order: as the file of pairs has them, or where they lie from the table, or by their bare names where these
differ and one pair alone has them. Segments count from 0. Several people may judge a segment: the majority
counts, a draw is a tie.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.reading.json_files import json_rows
from diffalign.errors import UserError, unknown
from diffalign.preferences.segments.pairs import Label, Pair

WORDS: Mapping[str, Label] = {
    **dict.fromkeys(("first", "a", "0", "left", "video_0"), "first"),
    **dict.fromkeys(("second", "b", "1", "right", "video_1"), "second"),
    **dict.fromkeys(("tie", "same", "equal", "0.5"), "tie"),
}
"""Words of a label, in any case."""

_TURNED: Mapping[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}


class ByFile:
    """Labels of a table. A segment without a row has none."""

    def __init__(self, path: str, pairs: Sequence[Pair]):
        """Read the table; UserError naming the row for a pair or a label that there is not."""
        self._where: dict[tuple[int, int], str] = {}
        self._votes: dict[tuple[int, int], Counter[Label]] = defaultdict(Counter)
        self._number = {id(pair): number for number, pair in enumerate(pairs)}
        names = _Names(pairs, Path(path).expanduser().parent)
        for where, row in _rows(path):
            number, turned = _pair_of(row, where, names, len(pairs))
            label, place = _label(row, where), (number, _whole(row, "segment", where))
            self._votes[place][_TURNED[label] if turned else label] += 1
            self._where.setdefault(place, where)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return "people"

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return a label a segment; UserError naming the row for a segment that the pair does not have."""
        number = self._number[id(pair)]
        for (of, segment), where in self._where.items():
            if of == number and segment >= count:
                raise UserError(
                    f"{where}: segment is {segment}; allowed: 0 to {count - 1} ({pair.where} is "
                    f"{pair.length:.2f} s long)"
                )
        return [_winner(self._votes.get((number, segment))) for segment in range(count)]


_Key = tuple[str, str]


class _Names:
    """The pairs by the names of their two files."""

    def __init__(self, pairs: Sequence[Pair], folder: Path):
        """``folder`` is the table's."""
        self._folder = folder
        self._written, self._places, self._bare = (defaultdict[_Key, list[int]](list) for _ in range(3))
        for number, pair in enumerate(pairs):
            first, second = pair.paths
            self._written[_key(map(Path, pair.names))].append(number)
            self._places[_key(path.resolve() for path in pair.paths)].append(number)
            if first.name != second.name:
                self._bare[first.name, second.name].append(number)

    def find(self, given: Sequence[Path], where: str) -> tuple[int, bool]:
        """Return (number of the pair, whether it is named the other way round); UserError for none or
        several.
        """
        written, place = _key(given), _key((self._folder / path.expanduser()).resolve() for path in given)
        for names, key in ((self._written, written), (self._places, place)):
            for turned, either in ((False, key), (True, key[::-1])):
                if found := names.get(either, []):
                    return self._only(found, given, where), turned
        bare = (given[0].name, given[1].name)
        straight, turned_round = (self._bare.get(key, []) for key in (bare, bare[::-1]))
        return self._only(straight + turned_round, given, where), not straight

    @staticmethod
    def _only(found: Sequence[int], given: Sequence[Path], where: str) -> int:
        both = " and ".join(map(str, given))
        if not found:
            raise UserError(f"{where}: no pair of {both}")
        if len(found) > 1:
            raise UserError(
                f"{where}: {both} are pairs {', '.join(map(str, found))}; allowed: the pair's number, or "
                "paths that are one pair's alone"
            )
        return found[0]


def _key(paths: Iterable[Path]) -> _Key:
    first, second = paths
    return str(first), str(second)


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


def _pair_of(row: Mapping[str, Any], where: str, names: _Names, pairs: int) -> tuple[int, bool]:
    """Return (number of the pair, whether the row has it the other way round)."""
    if row.get("pair") not in (None, ""):
        number = _whole(row, "pair", where)
        if number >= pairs:
            raise UserError(f"{where}: pair is {number}; allowed: 0 to {pairs - 1}")
        return number, False
    if row.get("video_0") is None or row.get("video_1") is None:
        raise UserError(f"{where}: found {', '.join(row)}; needed pair (or video_0, video_1), segment, label")
    return names.find([Path(str(row[name])) for name in ("video_0", "video_1")], where)


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
