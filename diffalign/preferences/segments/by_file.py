"""Segment labels from a file of human labels: a table with one row for each label of a segment.

    pair,segment,label              video_0,video_1,segment,label
    0,0,first                       a-0.mp4,a-1.mp4,0,tie

The table is csv or json lines. A pair is identified by its number in the file of pairs, from 0, or by its two
files in either order: by the paths in the file of pairs, by paths relative to the table, or by file names if
these differ and belong to one pair only. Segments are counted from 0. If several people label a segment, the
majority counts; a draw is a tie.
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
"""Accepted words of a label, in any case."""

_SWAPPED: Mapping[Label, Label] = {"first": "second", "second": "first", "tie": "tie"}


class ByFile:
    """A labeller that reads a table; segments without a row have no label."""

    def __init__(self, path: str, pairs: Sequence[Pair]):
        """Read the table.

        Raises:
            UserError: a row has an unknown pair, an unknown label or no segment; it names the row.
        """
        self._where: dict[tuple[int, int], str] = {}
        self._votes: dict[tuple[int, int], Counter[Label]] = defaultdict(Counter)
        self._number = {id(pair): number for number, pair in enumerate(pairs)}
        names = _Names(pairs, Path(path).expanduser().parent)
        for where, row in _rows(path):
            number, swapped = _pair_of(row, where, names, len(pairs))
            label, place = _label(row, where), (number, _integer(row, "segment", where))
            self._votes[place][_SWAPPED[label] if swapped else label] += 1
            self._where.setdefault(place, where)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return "people"

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return one label a segment.

        Raises:
            UserError: a row has a segment beyond ``count``; it names the row.
        """
        number = self._number[id(pair)]
        for (labelled, segment), where in self._where.items():
            if labelled == number and segment >= count:
                raise UserError(
                    f"{where}: segment is {segment}; allowed: 0 to {count - 1} ({pair.where} is "
                    f"{pair.length:.2f} s long)"
                )
        return [_winner(self._votes.get((number, segment))) for segment in range(count)]


_Key = tuple[str, str]


class _Names:
    """An index of pairs by the names of their two files."""

    def __init__(self, pairs: Sequence[Pair], folder: Path):
        """Index ``pairs``; relative paths of the table start from ``folder``."""
        self._folder = folder
        self._written, self._places, self._bare = (defaultdict[_Key, list[int]](list) for _ in range(3))
        for number, pair in enumerate(pairs):
            first, second = pair.paths
            self._written[_key(map(Path, pair.names))].append(number)
            self._places[_key(path.resolve() for path in pair.paths)].append(number)
            if first.name != second.name:
                self._bare[first.name, second.name].append(number)

    def find(self, files: Sequence[Path], where: str) -> tuple[int, bool]:
        """Return the number of the pair of these two files, and whether they are in the other order.

        Raises:
            UserError: no pair has these files, or several have.
        """
        written, place = _key(files), _key((self._folder / path.expanduser()).resolve() for path in files)
        for names, key in ((self._written, written), (self._places, place)):
            for swapped, either in ((False, key), (True, key[::-1])):
                if matches := names.get(either, []):
                    return self._only(matches, files, where), swapped
        bare = (files[0].name, files[1].name)
        in_order, in_reverse = (self._bare.get(key, []) for key in (bare, bare[::-1]))
        return self._only(in_order + in_reverse, files, where), not in_order

    @staticmethod
    def _only(matches: Sequence[int], files: Sequence[Path], where: str) -> int:
        both = " and ".join(map(str, files))
        if not matches:
            raise UserError(f"{where}: no pair of {both}")
        if len(matches) > 1:
            raise UserError(
                f"{where}: {both} are pairs {', '.join(map(str, matches))}; allowed: the pair's number, or "
                "paths that are one pair's alone"
            )
        return matches[0]


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
    """Return the number of a row's pair, and whether the row has its files in the other order."""
    if row.get("pair") not in (None, ""):
        number = _integer(row, "pair", where)
        if number >= pairs:
            raise UserError(f"{where}: pair is {number}; allowed: 0 to {pairs - 1}")
        return number, False
    if row.get("video_0") is None or row.get("video_1") is None:
        raise UserError(f"{where}: found {', '.join(row)}; needed pair (or video_0, video_1), segment, label")
    return names.find([Path(str(row[name])) for name in ("video_0", "video_1")], where)


def _integer(row: Mapping[str, Any], name: str, where: str) -> int:
    text = str(row.get(name, "")).strip()
    if not text.isdecimal():
        raise UserError(f"{where}: {name} is {row.get(name)!r}; allowed: a whole number from 0 on")
    return int(text)


def _label(row: Mapping[str, Any], where: str) -> Label:
    word = str(row.get("label", "")).strip().casefold()
    if word not in WORDS:
        raise unknown(f"label in {where}", row.get("label"), WORDS)
    return WORDS[word]
