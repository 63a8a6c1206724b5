"""``diffalign time-labels``: what a run prefers among pairs, in intervals of time (Semi-DPO)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import count, make_parser, number, output_file
from diffalign.cli.flags import read_flags, resolve
from diffalign.errors import UserError
from diffalign.utils.places import file_to_write

if TYPE_CHECKING:
    from diffalign.config.schema import Run
    from diffalign.preferences.time_labels import TimeLabels


def run(argv: Sequence[str]) -> int:
    """Label the pairs of a set by a finished run, and write the file that ``data.time_labels`` reads."""
    parser = make_parser("time-labels", DESCRIPTION, EXAMPLES)
    parser.usage = "diffalign time-labels RUN [--a.b VALUE ...] [options]"
    parser.add_argument(
        "--intervals",
        type=number(int, 1),
        default=10,
        metavar="A",
        help="equal intervals of time; default 10",
    )
    parser.add_argument(
        "--percentile",
        type=number(float, 0, 100),
        default=80.0,
        metavar="P",
        help="of confidence in each interval, from which a pair is labelled there; default 80",
    )
    parser.add_argument("--labels", type=output_file, metavar="FILE", help="default: RUN/time_labels.jsonl")
    args, rest = parser.parse_known_args(argv)
    if not rest or not Path(rest[0], "config.yaml").is_file():
        given = f": {rest[0]!r} has no config.yaml" if rest else ""
        raise UserError(
            f"time-labels needs the directory of a finished run, such as runs/iteration_0, first{given}"
        )
    settings, notes = resolve(
        read_flags([str(Path(rest[0], "config.yaml")), *rest[1:]]), needs=("model.path", "data.path")
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    file = file_to_write(args.labels or str(Path(rest[0], "time_labels.jsonl")))
    found = labelled(rest[0], settings, args.intervals, args.percentile)
    found.write(file)
    print(found.text)
    print(f"train with them: --method.type semi_dpo --data.time_labels {file}", file=sys.stderr)
    return 0


def labelled(spec: str, settings: "Run", intervals: int, percentile: float) -> "TimeLabels":
    """Return the labels of the pairs of a run's set, or of another one that its flags name."""
    import numpy as np
    import torch

    from diffalign.data import fixed_batches, read_preferences
    from diffalign.models.denoisers import AdaptersOff
    from diffalign.models.loading import load
    from diffalign.preferences.time_labels import TimeLabels, agreeing, confidences, pseudo_labels
    from diffalign.runs.load_pipeline import open_model
    from diffalign.runs.setup import encode
    from diffalign.training.acceleration import accelerator_for
    from diffalign.types import Denoiser

    accelerator = accelerator_for(settings.training)
    device = str(accelerator.device)
    model = open_model(spec, None, device)
    if model.split:
        raise UserError(f"{spec!r} is one of two experts, which knows only its times; allowed: one network")
    policy = model.denoiser()
    reference: Denoiser = AdaptersOff(policy, model.network)
    if settings.model.train == "full":
        reference = load(settings.model, device).denoiser()
    encoded = encode(settings, model, read_preferences(settings.data, settings.training.seed), accelerator)
    places = np.flatnonzero(encoded.records.sizes == 2)
    if not len(places):
        raise UserError("the set has no pairs; allowed: groups of two with a label")
    if left := len(encoded) - len(places):
        print(f"note: {count(left, 'group')} of other than two left out", file=sys.stderr)
    pairs, size, seed = encoded.subset(places), settings.training.batch_size, settings.training.seed
    names, trust, found = [], [], []
    buckets, codes = pairs.records.bucket_codes
    for code in range(len(buckets)):
        part = pairs.subset(np.flatnonzero(codes == code))
        batches = (b.to(device) for b in fixed_batches(part, model.family, settings.data, size, seed))
        found += list(confidences(policy, reference, batches, intervals, seed))
        trust.append(agreeing(part))
        names += part.records.column("where").to_pylist()
    trusted = torch.cat(trust)
    labels = pseudo_labels(torch.cat(found), trusted, percentile)
    rows = [(w, tuple(map(int, row))) for w, row in zip(names, labels.tolist(), strict=True)]
    return TimeLabels(rows, int(trusted.sum()))


DESCRIPTION = """\
Label the pairs of a preference set by what a finished run prefers against its base, anew in each of equal
intervals of time: 1 keeps the label, -1 turns it round, 0 leaves the pair out there (Semi-DPO). Pairs whose
label all of several reward models (`rewards`, or --data.rewards) confirm keep it everywhere. Takes all flags
of `train`: --data.path names another set than the run's."""

EXAMPLES = """
diffalign time-labels runs/iteration_0 --data.path pairs.parquet
diffalign train sd15_semi_dpo --data.path pairs.parquet --data.time_labels runs/iteration_0/time_labels.jsonl
"""
