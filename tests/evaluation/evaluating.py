"""One process of an evaluation: ``python -m tests.ranks 2 tests.evaluation.evaluating FOLDER``."""

import json
import sys
from pathlib import Path

import torch

from diffalign.cli.common import share
from diffalign.evaluation.report.report import write_contest
from tests.evaluation.test_running import Bench, facts


def main(folder: str) -> None:
    rank, world = share()
    bench, output = Bench(), Path(folder)
    for i, pipeline in enumerate(bench.pipelines.values()):  # the same weights in every process
        torch.nn.init.constant_(pipeline.network.weight, float(i))
        torch.nn.init.constant_(pipeline.network.bias, 0.0)
    found = bench.evaluate(output, rank=rank, world=world)
    assert (found is None) == (rank > 0)
    if found is not None:
        write_contest(output, found, facts(found), "two")
    work = {"images": len(bench.drawn), "scores": len(bench.scored)}
    (output / f"work-{rank}.json").write_text(json.dumps(work))


if __name__ == "__main__":
    main(*sys.argv[1:])
