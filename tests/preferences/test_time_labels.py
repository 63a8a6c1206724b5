"""Pseudo-labels in intervals of time: by arithmetic, and the command whose file a run reads."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffalign.cli import main
from diffalign.data.reading.time_labels import with_time_labels
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.preferences.time_labels import confidences, pseudo_labels
from diffalign.runs.align import align
from diffalign.runs.labels import tell_of_unread
from diffalign.runs.validate import read_run
from diffalign.types import Batch
from tests.helpers import Affine, sd_path


def test_confidences_by_hand():
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    batch = Batch(x, {}, torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    policy, reference = (Affine(sd_path(), torch.tensor(a).double(), torch.tensor(0.0)) for a in (0.3, 0.1))
    (found,) = confidences(policy, reference, [batch], 4, seed=3)
    noise = Streams.at(3, 0, 2, "time labels").normal(2, (2, 3, 3))[[0, 0, 1, 1]].double()
    for place, t in enumerate((0.125, 0.375, 0.625, 0.875)):
        time = torch.full((4,), t)
        noisy = add_noise(policy, x, noise, time)
        m, r = (((d(noisy, time, {}) - noise) ** 2).flatten(1).mean(1) for d in (policy, reference))
        assert found[0, place].item() == pytest.approx(((r[1] - m[1]) - (r[0] - m[0])).item(), rel=1e-5)
    assert found[1].abs().max() == 0  # a tie


def test_the_surest_pairs_of_each_interval_are_labelled_by_their_sign():
    c = torch.tensor([[5.0, 0.1], [-4.0, -0.2], [1.0, 0.3], [-2.0, -0.4], [0.0, 0.0], [-9.0, -9.0]])
    trusted = torch.tensor([False] * 5 + [True])
    found = pseudo_labels(c, trusted, 60.0)
    assert found.tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0], [1, 1]]
    assert pseudo_labels(c, trusted, 0.0)[:4].tolist() == c[:4].sign().tolist()
    assert pseudo_labels(c, torch.ones(6).bool()).eq(1).all()
    c[1, 1] = float("nan")
    with pytest.raises(UserError, match="the errors of 1 of 6 pairs are not finite"):
        pseudo_labels(c, trusted)


def test_a_million_pairs_are_more_than_one_quantile_takes():
    c = torch.linspace(-1, 1, 1_100_001)[:, None].expand(-1, 16)
    found = pseudo_labels(c, torch.zeros(len(c)).bool(), 90.0)
    assert found[:, 3].abs().mean().item() == pytest.approx(0.1, abs=1e-5)


def test_a_run_labels_pairs_and_another_one_learns_from_them(tmp_path, capsys):
    first = read_run("tiny_sdxl_dpo", ["--data.limit", "12", "--output", str(tmp_path / "first")])
    small = replace(first.training, steps=2, batch_size=4)
    first = replace(first, training=small, validation=replace(first.validation, every=0))
    align(first, lambda line: None)
    assert main(["time-labels", first.output, "--intervals", "4", "--percentile", "50"]) == 0
    assert "pairs, 0 trusted everywhere" in capsys.readouterr().out
    file = tmp_path / "first" / "time_labels.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 12 and {len(row["time_labels"]) for row in rows} == {4}
    assert {label for row in rows for label in row["time_labels"]} == {1, 0, -1}

    data = replace(first.data, time_labels=str(file), holdout=0.0)
    told = []
    second = replace(first, output=str(tmp_path / "second"), data=data, method={"type": "semi_dpo"})
    align(second, told.append)
    assert not [line for line in told if "does not read them" in line]
    assert f"data.time_labels={str(file)!r}: labels of 12 of 12 groups" in told
    other = replace(second, method={"type": "dpo"})
    tell_of_unread(other, build(other.method), SimpleNamespace(extras=()), told.append)
    assert "has time_labels, and dpo does not read them" in told[-1]


def test_files_that_do_not_fit(tmp_path, capsys):
    class Encoded(list):
        dense = False

    file = tmp_path / "labels.jsonl"
    encoded = Encoded()
    assert with_time_labels(encoded, None) is encoded
    for text, word in (
        ('{"where": "a", "time_labels": [2]}\n', "line 1: allowed: a row's name"),
        ('{"where": "a", "time_labels": [1]}\n{"where": "b", "time_labels": [1, 0]}\n', "different numbers"),
        ('{"where": "a", "time_labels": [1]}\n', "none of its 1 rows is in the training set"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            with_time_labels(encoded, str(file))
    assert main(["time-labels", "tiny_sdxl_dpo"]) == 2
    told = capsys.readouterr().err
    assert "needs the directory of a finished run" in told and "'tiny_sdxl_dpo' has no config.yaml" in told
