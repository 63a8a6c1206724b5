"""Shared by ``score``, ``pairs`` and ``agreement``: options of scoring, and the scorers with their cache."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import device_name, number, output_file

if TYPE_CHECKING:
    from diffalign.rewards.scoring.cache import ScoreCache
    from diffalign.rewards.scoring.score import Scorer


def add_scoring_options(parser: argparse.ArgumentParser, cache: str, of: str = "images") -> None:
    """Add the options; ``cache`` is the default place of scores, ``of`` names what is limited."""
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help=f"the first N {of} only")
    parser.add_argument(
        "--cache", type=output_file, metavar="FILE", help=f"scores that are known; default: {cache}"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=16, metavar="B", help="images at once; default 16"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16; default float32")


@contextmanager
def scorers_of(
    args: argparse.Namespace, specs: Sequence[str], cache: Path
) -> "Iterator[tuple[list[Scorer], ScoreCache | None]]":
    """Yield the scorers of the options and specs, and their cache, if there is one.

    After an interruption a line says where the scores so far are.
    """
    from diffalign.rewards.scoring.cache import ScoreCache
    from diffalign.rewards.scoring.score import make_scorers

    scorers = make_scorers(specs, device_name(args.device), args.dtype, args.batch_size)
    file = Path(args.cache) if args.cache else cache
    kept = ScoreCache(file) if any(scorer.is_cached for scorer in scorers) else None
    try:
        yield scorers, kept
    except KeyboardInterrupt:
        if kept is not None:
            print(f"the scores so far are in {file}; the same command goes on from there", file=sys.stderr)
        raise


def beside(source: Path, name: str) -> Path:
    """Return a file of this name in a folder, or beside a file."""
    return (source if source.is_dir() else source.parent) / name


def show_unreadable(places: Sequence[str]) -> None:
    """Print each on stderr."""
    for place in places:
        print(f"skipped, unreadable: {place}", file=sys.stderr)
