"""Two processes equal one process of twice the batch (rules 6, 7, 8)."""

import math

import pytest
import torch

from diffalign.utils.text import read_json_lines
from tests.helpers import in_two_processes
from tests.training.toys import distance, same
from tests.training.worker import MOMENTS, equal_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes("tests.training.worker", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(
    scope="module", params=[(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
def both(ranks, request):
    dtype, tolerance = request.param
    return ranks[0][str(dtype)], ranks[1][str(dtype)], equal_runs(1, dtype), tolerance


def test_there_were_two(ranks):
    assert [(r["world"], r["device"]) for r in ranks] == [(2, "cpu:0")] * 2


@pytest.mark.parametrize("run", ["plain", "ragged", "all ties", "refreshed", "sdpo", "fast slow"])
def test_two_processes_are_one_of_twice_the_batch(both, run):
    first, second, one, tolerance = both
    assert same(first[run], second[run]), "ranks hold the same parameters"
    assert distance(first[run], one[run]) < tolerance
    assert first[f"{run} metrics"] == second[f"{run} metrics"]
    assert first[f"{run} metrics"] == pytest.approx(one[f"{run} metrics"], rel=1e-4, abs=1e-6)


def test_a_gradient_norm_weighs_as_much_on_any_number_of_processes(both):
    """A checkpoint holds sums of metrics, which a resume on other processes adds to."""
    assert [outcome["plain norms"] for outcome in both[:3]] == [6, 6, 6]
    assert [outcome["all ties norms"] for outcome in both[:3]] == [0, 0, 0]


def test_ties_were_ragged(ranks):
    terms = list(zip(ranks[0]["terms"], ranks[1]["terms"], strict=True))
    assert any(a != b for a, b in terms)
    assert any(min(pair) == 0 < max(pair) for pair in terms), "one rank had ties alone"


def test_clipping_acts_on_the_synchronised_gradient(both):
    first, second, one, tolerance = both
    assert same(first[MOMENTS], second[MOMENTS])
    assert distance(first[MOMENTS], one[MOMENTS]) < tolerance
    norm = math.sqrt(sum(float((m / 0.1).square().sum()) for m in first[MOMENTS].values()))
    unclipped = one["ragged metrics"]["grad_norm"]
    assert unclipped > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-3)  # max_grad_norm


def test_ranks_draw_different_noise(ranks):
    """Rule 6: no row of noise is drawn twice, on either rank or in any micro-step."""
    rows = torch.cat([ranks[0]["noise"], ranks[1]["noise"]]).flatten(1)
    assert len(rows) >= 2 * 3 * 2 * 2
    assert len(rows.unique(dim=0)) == len(rows)


def test_held_out_batches_are_shared_out(both):
    first, second, one, _ = both
    assert first["held out"] == second["held out"]
    assert first["held out"] == pytest.approx(one["held out"], rel=1e-3, abs=1e-5)


def test_a_signal_to_one_rank_stops_all_and_the_run_continues_exactly(ranks, folder):
    assert [r["stopped"] for r in ranks] == [(True, 5)] * 2
    assert [r["ended"] for r in ranks] == [(False, 8)] * 2
    for r in ranks:
        assert same(r["whole"], r["second"])
    whole, parts = (
        [
            {k: v for k, v in r.items() if k not in ("samples_per_second", "peak_memory_gib")}
            for r in read_json_lines(folder / run / "metrics.jsonl")
        ]
        for run in ("whole", "parts")
    )
    assert [r["step"] for r in whole] == [4, 8]
    assert whole == parts
