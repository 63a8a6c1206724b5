"""Displacement: CHES by hand, the inner product against what a step does, the report and the filter."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from diffalign.cli import main
from diffalign.data.reading.drop import leave_out
from diffalign.errors import UserError
from diffalign.evaluation.displacement import PairRow, ches, last_input, measure, report
from diffalign.types import Batch
from tests.helpers import VECTORS, GivenTimes, sd_path

GOLDEN = VECTORS / "llm_objectives.npz"


def test_ches_by_hand():
    """Winner sums to (3, 1), loser to (2, 2): 8 - 10; as means (1.5, .5) and (2, 2) of what counts."""
    chosen = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
    rejected = torch.tensor([[[2.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[1.0, 0.0]])
    assert ches(chosen, rejected, rejected_mask=mask).tolist() == [-2.0]
    assert ches(chosen, rejected, rejected_mask=mask, normalised=True).tolist() == [4.0 - 2.5]
    assert ches(chosen, chosen).tolist() == [0.0], "a pair of equals"


def test_ches_golden():
    f = np.load(GOLDEN)
    if "ches_score" not in f:
        pytest.skip("among the shipped vectors there is no ches_score")
    inputs = sorted(k for k in f if k.startswith("ches_") and f[k].ndim > 1)
    winners = [k for k in inputs if k.rstrip("0123456789_").endswith(("w", "chosen", "pos", "preferred"))]
    losers = [k for k in inputs if k not in winners]
    side = lambda names: [h for k in names for h in (f[k] if f[k].ndim == 3 else f[k][None])]  # noqa: E731
    pairs = list(zip(side(winners), side(losers), strict=True))
    for name, normalised in (("ches_score", False), ("ches_score_lennorm", True)):
        got = [ches(torch.tensor(w)[None], torch.tensor(l)[None], normalised=normalised) for w, l in pairs]  # noqa: E741
        np.testing.assert_allclose(torch.cat(got).numpy(), f[name], atol=1e-10)


class Shared(nn.Module):
    """Says the same whatever it is asked, so that every push on one sample is a push on all."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)
        self.out = nn.Linear(2, 2).double()
        self.path, self.target = sd_path(), "eps"

    def forward(self, x_t, t, cond):
        self.out(x_t)
        return self.value.expand_as(x_t)

    __call__ = forward


def pairs(x, scores=(1.0, 0.0, 0.0, 1.0, 0.5, 0.5)):
    return Batch(x, {}, torch.arange(3).repeat_interleave(2), torch.tensor(scores))


def test_the_inner_product_foretells_what_a_step_does_to_the_winner():
    """Where all samples share their output, a step of push and pull moves the winner's error as foretold."""
    from diffalign.diffusion.noising import Forward
    from diffalign.diffusion.randomness import Streams

    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Shared(torch.tensor([0.3, -0.4], dtype=torch.float64))
    model.target = "x0"  # so that the two members have different targets
    times = GivenTimes((0.2, 0.5, 0.7))
    (found,) = measure(model, model, [pairs(x)], times, draws=1)
    assert found.groups.tolist() == [0, 1], "a tie has no winner"
    streams = Streams.at(0, 0, 3, "displacement 0")
    z = Forward()(model, x, times(3, None)[pairs(x).group], {}, pairs(x).group, streams)
    for row, (w, l) in enumerate(((0, 1), (3, 2))):  # noqa: E741
        error = lambda i, v: ((v - x[i]) ** 2).mean()  # noqa: E731
        value = model.value.detach().clone().requires_grad_(True)
        (g,) = torch.autograd.grad(error(w, value) - error(l, value), value)
        moved = (error(w, value - 1e-6 * g) - error(w, value)).item() / 1e-6
        assert moved == pytest.approx(float(found.inner[row] - found.own[row]), abs=1e-5)
        g_w, g_l = 2 / 2 * (model.value.detach() - x[w]), 2 / 2 * (model.value.detach() - x[l])
        assert found.inner[row].item() == pytest.approx((g_w @ g_l).item(), rel=1e-5)
        seen = ches(z.x_t[w][None, None], z.x_t[l][None, None], normalised=True)
        assert found.ches[row].item() == pytest.approx(seen.item(), rel=1e-4)


def test_lists_give_their_best_against_their_worst_and_likes_nothing():
    model = Shared(torch.zeros(2, dtype=torch.float64))
    x = torch.randn(6, 2, dtype=torch.float64)
    group, score = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.1, 0.9, 0.5, 2.0, 2.0, 1.0])
    (found,) = measure(model, model, [Batch(x, {}, group, score)], GivenTimes((0.5,) * 3), draws=2)
    assert found.groups.tolist() == [0]
    with pytest.raises(UserError, match="draws=0"):
        list(measure(model, model, [], GivenTimes(()), draws=0))


def test_the_last_layers_input():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.SiLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(4, 2, 5, 5)
    with last_input(network) as seen:
        network(x)
    hidden = network[1](network[0](x))
    assert torch.equal(seen[0], hidden.flatten(2).transpose(1, 2)) and seen[0].shape == (4, 25, 3)
    assert not network[2]._forward_pre_hooks


ROWS = [
    PairRow("a row 0", "one", 3.0, 2.0, 0.1),
    PairRow("a row 1", "two", -1.0, 2.0, 0.4),
    PairRow("a row 2", "three", 1.0, 2.0, 0.2),
    PairRow("a row 3", "four", 5.0, 2.0, -0.3),
]


def test_report_and_filter(tmp_path):
    found = report(ROWS)
    assert [row.where for row in found.rows] == ["a row 3", "a row 0", "a row 2", "a row 1"]
    assert (found.dropped, found.endangered) == (2, 2)
    assert "2 of 4 pairs are likely" in found.text() and "a row 3: four" in found.text()
    file, names = found.write(tmp_path)
    data = json.loads(file.read_text())
    assert [row["dropped"] for row in data["rows"]] == [True, True, False, False]
    assert data["rows"][0]["overlap"] == 2.5 and data["pairs"] == 4
    assert names.read_text().splitlines()[1:] == ["a row 3", "a row 0"]
    assert report(ROWS, "ches", share=0.5).rows[0].where == "a row 1"
    assert report(ROWS, "ches", share=0.5).dropped == 2 and report(ROWS, "overlap", above=2).dropped == 1
    for arguments, words in (
        ({"by": "ches"}, "no natural limit"),
        ({"share": 1.0}, "share=1.0"),
        ({"share": 0.1, "above": 1.0}, "allowed: one of them"),
    ):
        with pytest.raises(UserError, match=words):
            report(ROWS, **arguments)
    broken = [*ROWS, replace(ROWS[0], where="a row 4", own=float("nan"))]
    with pytest.raises(UserError, match="1 of 5 pairs have numbers that are not finite, the first: a row 4"):
        report(broken)


def test_the_command_writes_a_list_that_training_leaves_out(tmp_path, capsys):
    from diffalign.runs.align import align
    from diffalign.runs.validate import read_run

    output = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")  # of a run there: its folder is still the output
    flags = ["--data.limit", "24", "--output", output, "--training.batch_size", "5"]
    assert main(["displacement", "tiny_sdxl_dpo", *flags, "--share", "0.25", "--draws", "2"]) == 0
    assert "of 24 pairs are likely" in (said := capsys.readouterr()).out and "--data.drop" in said.err
    data = json.loads((tmp_path / "run" / "displacement.json").read_text())
    assert len(data["rows"]) == 24 and data["dropped"] == 6
    assert len({row["where"] for row in data["rows"]}) == 24 and all(row["prompt"] for row in data["rows"])

    run = read_run("tiny_sdxl_dpo", [*flags, "--training.steps", "1", "--data.holdout", "0"])
    said = []
    align(replace(run, data=replace(run.data, drop=f"{output}/dropped.txt")), said.append)
    assert any("on 18 groups" in line for line in said)
    assert main(["displacement", output, "--show", "0", "--by", "ches", "--share", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["by"] == "ches"


def test_the_command_refuses(tmp_path, capsys):
    for argv, words in (
        ([], "needs a config"),
        (["tiny_sdxl_dpo", "--by", "ches"], "--by ches has no natural limit"),
        (["tiny_sdxl_dpo", "--share", "0.1", "--above", "2"], "allowed: one of them"),
        (["tiny_sdxl_dpo", "--share", "1"], "--share 1.0 leaves out every pair"),
        (["tiny_sdxl_dpo", "--data.limmit", "3"], "data.limit"),
        (
            ["tiny_sdxl_dpo", "--data.path", "tiny:likes", "--data.limit", "4", "--output", str(tmp_path)],
            "data.path 'tiny:likes' has no pairs to measure: ",
        ),
    ):
        assert main(["displacement", *argv]) == 2
        assert words in capsys.readouterr().err


def test_a_list_of_other_rows_is_refused(tmp_path):
    class Encoded(list):
        """A set whose records are a table of one column."""

        @property
        def records(self):
            return pa.table({"where": [row.where for row in self]})

        def subset(self, indices):
            return Encoded(self[i] for i in indices)

    encoded = Encoded(ROWS)
    file = tmp_path / "drop.txt"
    file.write_text("# a comment\na row 1\n\n a row 9 \n")
    assert [row.where for row in leave_out(encoded, str(file))] == ["a row 0", "a row 2", "a row 3"]
    assert leave_out(encoded, None) is encoded
    told: list[str] = []
    leave_out(encoded, str(file), told.append)
    assert told == [f"data.drop={str(file)!r}: 1 of 4 groups left out; 1 further names are of no row of the "
                    "training set"]  # fmt: skip
    file.write_text("# nothing is above the bound\n")
    assert len(leave_out(encoded, str(file), told.append)) == 4
    assert told[1:] == [f"data.drop={str(file)!r}: 0 of 4 groups left out"]
    file.write_text("b row 1\n")
    with pytest.raises(UserError, match=r"none of its 1 rows is in the training set.*'a row 0'"):
        leave_out(encoded, str(file))
    file.write_text("".join(f"a row {i}\n" for i in range(4)))
    with pytest.raises(UserError, match="leaves no row of 4"):
        leave_out(encoded, str(file))
    with pytest.raises(UserError, match=r"data\.drop: no such file"):
        leave_out(encoded, str(tmp_path / "nowhere"))
