"""``diffalign agreement``: accuracy of rewards on labelled preferences, and agreement among rewards."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import count, make_parser, names, number, parse, print_json, table
from diffalign.cli.scoring import add_scoring_options, beside, scorers_of, show_unreadable

if TYPE_CHECKING:
    from diffalign.evaluation.agreement import Rated, Report
    from diffalign.evaluation.measuring.statistics import Estimate


def run(argv: Sequence[str]) -> int:
    """Score the labelled images, and print accuracy and agreement of the rewards."""
    args = parse(_parser(), argv)
    specs = names(args.rewards, "--rewards")

    from diffalign.rewards.registry import parse as parse_spec

    for spec in specs:
        parse_spec(spec)  # checks names before anything is loaded

    from diffalign.config.schema import DataConfig
    from diffalign.data import check_files, read_preferences
    from diffalign.evaluation.agreement import rate, report

    place = Path(args.data).expanduser()
    videos = args.videos or place.suffix == ".csv"
    config = DataConfig(
        path=args.data,
        limit=args.limit,
        label=args.label,
        split=args.split,
        frames=1 if videos else None,
    )
    preferences = read_preferences(config)
    if args.videos:
        check_files(preferences, config)
    cache = beside(place, "score-cache.sqlite") if place.exists() else Path("score-cache.sqlite")
    with scorers_of(args, specs, cache) as (scorers, kept):
        rated = rate(preferences, scorers, kept, of_videos=videos)
    found = report(rated.groups, [scorer.name for scorer in scorers], args.bins)
    show_unreadable(rated.unreadable)
    if args.json:
        print_json(as_json(args.data, rated, found))
    else:
        print(as_text(args.data, rated, found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("agreement", DESCRIPTION, EXAMPLES)
    parser.add_argument("data", help="labelled preferences: anything that `train --data.path` reads")
    parser.add_argument(
        "--rewards", required=True, metavar="A,B", help="names of `diffalign rewards`, NAME:FILE_OR_FOLDER"
    )
    parser.add_argument(
        "--bins", type=number(int, 1), default=4, metavar="N", help="quantiles of the margin; default 4"
    )
    parser.add_argument("--label", default="", metavar="COLUMN", help="of a csv: Overall, VQ, MQ or TA")
    parser.add_argument("--split", default="train", help="of a hub dataset; default train")
    parser.add_argument("--videos", action="store_true", help="the set holds videos (a csv always does)")
    add_scoring_options(parser, "score-cache.sqlite in, or beside, the data", "rows")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    return parser


def as_json(data: str, rated: "Rated", found: "Report") -> dict[str, object]:
    """All numbers; intervals as {value, low, high}."""
    return {
        "data": data,
        "pairs": found.pairs,
        "ties": found.ties,
        "groups": len(rated.groups),
        "unlabelled": rated.counts.unlabelled,
        "single_images": rated.singles,
        "unreadable": list(rated.unreadable),
        "rewards": [asdict(accuracy) for accuracy in found.accuracies],
        "agreement": [asdict(agreement) for agreement in found.agreements],
    }


def as_text(data: str, rated: "Rated", found: "Report") -> str:
    """Return the numbers as tables."""
    counts = [f"{count(found.pairs - found.ties, 'pair')} with a winner", count(found.ties, "tie")]
    counts += [f"{count(rated.counts.unlabelled, 'row')} without label"] if rated.counts.unlabelled else []
    counts += [f"{count(rated.singles, 'single image')} without rival"] if rated.singles else []
    counts += [count(len(rated.unreadable), "unreadable image")] if rated.unreadable else []
    of_ties = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    accuracies = [
        (
            one.reward,
            _shown(one.accuracy),
            *map(str, (one.right, one.wrong, one.equal)),
            f"{one.median_margin:.4g}",
            of_ties(one.median_margin_of_ties),
        )
        for one in found.accuracies
    ]
    header = ("reward", "accuracy (95 %)", "right", "wrong", "equal", "median margin", "of ties")
    margins = [
        (one.reward, f"{b.low:.4g} to {b.high:.4g}", str(b.pairs), _shown(b.accuracy))
        for one in found.accuracies
        for b in one.by_margin
    ]
    agreements = [
        (one.first, one.second, _shown(one.same), str(one.pairs), str(one.undecided), f"{one.tau:+.2f}")
        for one in found.agreements
        if one.same is not None
    ]
    parts = [
        f"{data}: {', '.join(counts)}",
        table(accuracies, header),
        table(margins, ("reward", "margin", "pairs", "accuracy (95 %)")),
    ]
    if agreements:
        parts.append(
            table(agreements, ("reward", "and", "prefer the same (95 %)", "pairs", "undecided", "tau"))
        )
    return "\n\n".join(parts)


def _shown(estimate: "Estimate") -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


DESCRIPTION = """\
Measure how often rewards agree with people: accuracy on a labelled set with Wilson's 95 % interval, also by
margin (is it right where it is sure?), and the agreement of every two rewards. Labels that are ties are
reported separately; equal scores count half. The median margin of ties suggests a value for
`diffalign pairs --tie`. Scores are cached, so that a second call is fast."""

EXAMPLES = """
diffalign agreement tiny:pairs --rewards judge,tiny_clip
diffalign agreement pairs.parquet --rewards pickscore,aesthetic_v2,hpsv2_1 --bins 5
diffalign agreement videos.csv --label MQ --rewards pickscore --json
"""
