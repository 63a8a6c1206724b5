"""The harness of the leaderboard: counts, rows that resume, several writers, tables. No long training."""

import io
import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    claims,
    claims_list,
    claims_table,
    figures,
    figures_samples,
    figures_training,
    methods,
    over_optimisation,
    over_optimisation_page,
    plane_world,
    record,
    tables,
    tiny_world,
    tuned_page,
    tuning,
)
from benchmarks.claims_list import Arm, Claim, Comparison
from benchmarks.counting import Calls, counted
from benchmarks.memory import Alive
from diffalign import tiny
from diffalign.config.io import shipped_configs
from diffalign.config.schema import ModelConfig
from diffalign.diffusion.randomness import Streams
from diffalign.evaluation.measuring.statistics import bootstrap_mean
from diffalign.methods import REGISTRY
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.models.loading import load
from diffalign.plane.plane import PlaneNetwork, denoiser_of
from diffalign.plane.settings import PLANE_METHODS
from diffalign.runs import demo
from diffalign.strategies import wrap
from diffalign.types import Batch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Restore threads and denormals, which the commands set for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture
def apart(monkeypatch, tmp_path):
    """Make a record in its own folder, over an untrained base, with rows of 20 steps."""
    network = PlaneNetwork()
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(record, "WORK", tmp_path / "work")
    monkeypatch.setattr(methods, "POINTS", 30)
    monkeypatch.setattr(plane_world, "base", lambda mislabelled=False: network)
    monkeypatch.setattr(plane_world, "BUDGET", 20 * 16 * 8.0)
    small = {n: replace(PLANE_METHODS[n], groups=16) for n in ("dpo", "sft")}
    monkeypatch.setattr(methods, "PLANE_METHODS", small)
    clear()
    yield tmp_path
    clear()


def clear():
    plane_world.drawn.cache_clear()
    plane_world.start.cache_clear()


@pytest.mark.parametrize(("method", "calls"), [(DPO(), Calls(4, 4, 4)), (SFT(), Calls(0, 2, 2))])
def test_counted_calls_are_a_hand_count(method, calls):
    """Two pairs: the preference method asks both networks about four samples, SFT one about two winners."""
    policy, reference = PlaneNetwork(), PlaneNetwork()
    group = torch.arange(2).repeat_interleave(2)
    batch = Batch(torch.randn(4, 2), {"label": group}, group, torch.tensor([1.0, 0, 0, 1]))
    with counted(PlaneNetwork) as counts:
        step = method(denoiser_of(policy), denoiser_of(reference), batch, Streams.at(0, 0, 2))
        step.loss.backward()
    policy(batch.x, torch.zeros(4), group)  # outside: not counted
    assert counts == calls
    assert counts.cost == calls.held + 3 * calls.trained


def test_a_second_backward_is_counted_and_a_tuple_is_read():
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    network = Twice(3, 1)
    with counted(Twice) as calls:
        out = network(torch.ones(5, 3))[0].sum()
        out.backward(retain_graph=True)
        out.backward()
    assert calls == Calls(0, 5, 10) and calls.per(5) == Calls(0, 1, 2)


def test_a_row_of_the_plane_is_made_once(apart, monkeypatch):
    methods.main(["--world", "plane", "--methods", "dpo,sft", "--seeds", "2"])
    rows = record.rows("plane-")
    assert [(r["method"], r["seed"]) for r in rows] == [("dpo", 0), ("dpo", 1), ("sft", 0), ("sft", 1)]
    dpo, sft = rows[0], rows[2]
    assert dpo["calls"] == {"held": 32, "trained": 32, "back": 32} and dpo["steps"] == 20
    assert sft["calls"] == {"held": 0, "trained": 16, "back": 16} and sft["steps"] == 53
    assert dpo["compute"] == 2560 and abs(sft["compute"] / 2560 - 1) < 0.02
    assert len(dpo["gains"]) == 30
    assert np.mean(dpo["gains"]) == pytest.approx(dpo["rewards"]["height"]["gain"][0], abs=5e-3)
    assert "| dpo |" in (record.HERE / "methods.md").read_text()
    assert len(json.loads((record.HERE / "methods.json").read_text())["rows"]) == 4

    made = []
    monkeypatch.setattr(plane_world, "run", lambda *a, **k: made.append(a) or {**dpo, "gains": [0.0] * 30})
    methods.main(["--world", "plane", "--seeds", "3"])
    assert [seed for _, seed, _ in made] == [2, 2]  # the rows of seeds 0 and 1 are there
    changed = replace(methods.PLANE_METHODS["dpo"], method=DPO(beta=7))
    monkeypatch.setattr(methods, "PLANE_METHODS", {"dpo": changed})
    methods.main(["--world", "plane", "--seeds", "1"])
    assert len(made) == 3  # a changed setting makes a row stale


def test_an_unknown_method_is_refused():
    with pytest.raises(SystemExit, match=r"dop: no such method; allowed:.* dpo"):
        methods.main(["--methods", "dop"])


def test_a_lock_is_held_by_one(apart):
    with record.lock("one", wait=False) as mine:
        with record.lock("one", wait=False) as theirs:
            assert mine and not theirs
        with record.lock("other", wait=False) as also:
            assert also
    with record.lock("one", wait=False) as again:
        assert again


WRITER = """
import sys, time
from pathlib import Path
from benchmarks import methods, plane_world, record
record.HERE, record.WORK = Path(sys.argv[1]) / "benchmarks", Path(sys.argv[1]) / "work"
log = Path(sys.argv[1]) / "made"
def run(row, seed, points):
    with log.open("a") as file:
        file.write(f"{row.method} {seed}\\n")
    time.sleep(0.02)
    reward = {"base": 0, "aligned": 1, "gain": [1, 0, 2]}
    return {"primary": "height", "rewards": {"height": reward}, "gains": [0.5, 1.5], "seconds": 0, "steps": 1,
            "figures": {"off support": 0, "distance": 0}, "calls": {"held": 1, "trained": 1, "back": 1}}
plane_world.run = run
methods.main(["--world", "plane", "--methods", "dpo,sft,ipo,hinge", "--seeds", "5"])
"""


def test_two_writers_share_the_rows_and_lose_none(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    made = (tmp_path / "made").read_text().splitlines()
    assert len(made) == len(set(made)) == 20
    assert len(json.loads((tmp_path / "benchmarks" / "methods.json").read_text())["rows"]) == 20
    assert (tmp_path / "benchmarks" / "methods.md").read_text().count("+1.000 [+0.500, +1.500]") == 4


def row(world, method, seed, gains, **more):
    gain = float(np.mean(gains))
    reward = {"base": 0.5, "aligned": 0.5 + gain, "gain": [gain, gain - 0.1, gain + 0.1]}
    return {
        "name": f"{world}-{method}-{seed}",
        "world": world,
        "method": method,
        "seed": seed,
        "asked": {"prompts": len(gains), "budget": 100.0},
        "primary": "judge",
        "rewards": {"judge": reward, "taste": reward, "tiny_clip": reward},
        "gains": gains,
        "figures": {},
        "steps": 6,
        "seconds": 12.4,
        "calls": {"held": 2.0, "trained": 1.0, "back": 1.0},
        "date": "2026-01-0" + str(seed + 1),
        "machine": "2 cores",
        "versions": {"torch": "2"},
        **more,
    }


def test_the_table(apart):
    rows = [row("tiny", "dpo", s, [0.1, 0.1]) for s in range(2)]
    rows += [row("tiny", "sft", s, [0.3, 0.3]) for s in range(2)] + [row("tiny", "ipo", 0, [-0.2, 0.2])]
    record.HERE.mkdir()
    trial = {"world": "tiny", "method": "ipo", "flags": ["--method.beta=2"], "gain": [0.01, -0.1, 0.1]}
    (record.HERE / "tuning.json").write_text(json.dumps({"trials": [trial]}))
    lines = tables.text(rows).splitlines()
    body = [line for line in lines if line.startswith("| ") and "gain" not in line]
    assert [line.split(" | ")[0] for line in body] == ["| sft", "| dpo", "| ipo"]
    assert body[1] == (
        "| dpo | +0.100 [+0.100, +0.100] | +0.100, +0.100 | +0.100 | +0.100 | 6 | 2, 1, 1 | 12 | better |"
    )
    assert body[2].endswith("| one seed |")  # whatever its interval
    assert any(
        "`ipo` has no interval of the judge above 0" in x and "--method.beta=2: +0.010" in x for x in lines
    )
    assert any("2 prompts, budget 100" in x and "2026-01-01 to 2026-01-02" in x for x in lines)


def test_reward_gradients_have_a_table_with_the_reward_that_they_are_trained_on(apart):
    record.HERE.mkdir()
    (record.HERE / "tuning.json").write_text(json.dumps({"trials": []}))

    def online(method, rewards, seed, gain):
        asked = {"prompts": 2, "budget": 100.0, "rollout": {"RolloutConfig": {"rewards": rewards}}}
        return row("tiny", method, seed, [gain, gain], asked=asked, figures={"images": 8.0})

    rows = [online("draft", ["0.1*tiny_clip"], s, 0.5 + s) for s in range(2)]
    rows += [online("spo", ["step_aware:tiny"], 0, 0.2), online("ddpo", ["judge"], 0, 0.1)]
    sampled, gradients = tables.text(rows).split("## The tiny SDXL: reward gradients")
    assert "## The tiny SDXL: online" in sampled and "| spo |" in sampled and "| ddpo |" in sampled
    assert "| method | gain | seeds | trained | taste | images |" in gradients
    line = "| draft | +1.000 [+0.500, +1.500] | +0.500, +1.500 | +0.50 [+0.40, +0.60], +1.50 [+1.40, +1.60] |"
    assert line in gradients and "the tiny CLIP were not trained on" not in gradients


def test_every_method_has_the_same_trials_and_the_best_finalist_is_used(monkeypatch, apart):
    """A quarter of DPO's beta and twice its rate is best with the first seed, a quarter alone over all three.

    SFT has no strength.
    """
    gains = {"beta=250": 0.2, "beta=250 learning_rate=0.001": 0.3, "learning_rate=0.000125": 0.4}
    record.HERE.mkdir()

    def run(name, recipe, split, prompts):
        assert split == "validation"
        beta, rate = recipe.method.get("beta"), recipe.optimizer.learning_rate
        key = " ".join([*([f"beta={beta:g}"] if beta != 1000 and beta else []), *(
            [f"learning_rate={rate:g}"] if rate != 5e-4 else [])])  # fmt: skip
        lucky = recipe.training.seed == tuning.SEED or key != "beta=250 learning_rate=0.001"
        gain = [gains.get(key, 0.1) if lucky else 0.1, 0.0, 1.0]
        return {"primary": "judge", "rewards": {"judge": {"gain": gain}}, "steps": 1, "seconds": 1.0}

    monkeypatch.setattr(tiny_world, "run", run)
    said = []
    for method in ("dpo", "sft"):
        assert tuning.chosen(method, "tiny") == []
        tuning.tune(method, "tiny", said.append)
        tuning.tune(method, "tiny", said.append)  # all there: nothing is made twice
    assert len(said) == 2 * tuning.RUNS == len(tuning.tried())
    assert len(tuning.trials_of("tiny", "dpo")) == tuning.TRIALS
    first = max(tuning.trials_of("tiny", "dpo"), key=lambda t: t["gain"][0])
    assert first["flags"] == ["--method.beta=250", "--optimizer.learning_rate=0.001"]
    finalists = tuning.chosen("dpo", "tiny")
    assert [[t["seed"] for t in seeds] for seeds in finalists] == [[100, 101, 102]] * tuning.FINALISTS
    assert [t["flags"] for t in finalists[0]] == [["--method.beta=250"]] * 3
    assert tuning.gains_of("tiny", "dpo", first["flags"]) == [0.3, 0.1, 0.1]
    assert tuning.at_edge(tuning.trials_of("tiny", "dpo")) == ["learning_rate"]
    assert tuning.chosen("sft", "tiny")[0][0]["flags"] == ["--optimizer.learning_rate=0.000125"]
    assert tuning.at_edge(tuning.trials_of("tiny", "sft")) == []


def test_tuned_methods_have_a_table_of_their_own(apart):
    record.HERE.mkdir()
    trials = [
        {"world": "tiny", "method": m, "flags": flags, "gain": [gain, 0.0, 1.0]}
        for m in ("dpo", "ipo")
        for flags, gain in (([], 0.1), (["--method.beta=4"], 0.2), (["--method.beta=1"], 0.0))
    ]
    (record.HERE / "tuning.json").write_text(json.dumps({"trials": trials}))
    random = np.random.default_rng(0)
    told = {"diversity": 0.9, "drift": 1.5}
    more = {"trials": 3, "flags": ["--method.beta=4"], "figures": told}
    rows = [row("tiny", "dpo", s, (0.1 + 0.1 * random.normal(size=50)).tolist(), **more) for s in range(3)]
    rows += [row("tiny", "ipo", s, (0.3 + 0.1 * random.normal(size=50)).tolist(), **more) for s in range(3)]
    said = tables.text([*rows, row("tiny", "sft", 0, [0.3, 0.3])])
    tuned, rest = said.split("## The tiny SDXL, settings of the recipes")
    assert "## The tiny SDXL, tuned" in tuned and "| sft |" in rest and "| sft |" not in tuned
    compared = [line for line in tuned.splitlines() if " to " in line and line.startswith("| ")]
    assert compared[0].startswith("| ipo | 1 to 1 |  |  | beta=4 | beta |")
    assert compared[1].startswith("| dpo | 2 to 2 | +0.180 [+0.151")
    assert "as shipped: +0.100; beta=4: +0.200; beta=1: +0.000" in compared[1]


def test_ranks_and_differences_of_methods_are_those_of_their_gains():
    """Two methods of one distribution share ranks 1 and 2; one that is far behind has rank 3 alone."""
    random = np.random.default_rng(1)
    prompts = random.normal(size=200)
    a, b = (prompts + random.normal(0.2, 0.5, (5, 200)) for _ in range(2))
    c = prompts + random.normal(-0.5, 0.5, (5, 200))
    assert record.ranks([a, b, c]) == [(1, 2), (1, 2), (3, 3)]
    estimate, p = record.between(a, b)
    assert estimate.value == pytest.approx(a.mean() - b.mean())
    assert estimate.low < 0 < estimate.high and p > 0.05
    estimate, p = record.between(a, c)
    assert estimate.low > 0.6 and p <= 2 / record.RESAMPLES
    # Prompts that both share cancel: the interval is narrower than that of either mean.
    assert estimate.high - estimate.low < record.over_seeds(a).high - record.over_seeds(a).low


def test_figures_show_what_is_in_the_rows(apart):
    """A method above 0 is blue, one whose interval holds 0 grey; trials are curves over multiples."""
    rows = [row("tiny", "dpo", s, [0.2, 0.2]) for s in range(2)] + [row("tiny", "ipo", 0, [-0.2, 0.2])]
    axis = figures.ranks(rows).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ipo", "dpo"]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_color()) for dot in dots] == [
        (0.0, "0.55"),
        (pytest.approx(0.2), "C0"),
    ]
    asked = {"method": {"DPO": {"beta": 8.0}}, "optimizer": {"OptimizerConfig": {"learning_rate": 0.1}}}
    trials = [
        {"world": "tiny", "method": "dpo", "flags": flags, "gain": [gain, 0, 1], "asked": asked}
        for flags, gain in (
            ([], 0.1),
            (["--method.beta=2"], 0.3),
            (["--method.beta=2", "--optimizer.learning_rate=0.2"], 0.2),
        )
    ]
    assert tuning.curves(trials) == ([(0.25, 0.3), (1.0, 0.1)], [(1.0, 0.3), (2.0, 0.2)])
    strength, rate = figures.sensitivity(trials).axes
    assert strength.lines[0].get_xdata().tolist() == [0.25, 1.0] and len(rate.lines) == 2
    record.HERE.mkdir()
    (record.HERE / "methods.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit, match="--only rank: no such figure; allowed: ranks"):
        figures.main(["--only", "rank"])


def test_intervals_over_seeds():
    """One seed: the bootstrap over prompts. Equal prompts: seeds alone, of which 27 draws of 3 exist."""
    values = np.random.default_rng(0).normal(0.1, 1, 400)
    one, plain = record.over_seeds([values]), bootstrap_mean(values)
    assert one.value == pytest.approx(plain.value)
    assert one.low == pytest.approx(plain.low, abs=0.01) and one.high == pytest.approx(plain.high, abs=0.01)
    seeds = record.over_seeds([[v] * 50 for v in (0.0, 0.3, 0.6)])
    assert (seeds.value, seeds.low, seeds.high) == pytest.approx((0.3, 0.0, 0.6))
    same = record.over_seeds([values, values, values])
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.05)  # seeds add no prompts


def test_every_method_has_a_tiny_recipe():
    tiny = [name.split("_", 2) for name in shipped_configs() if name.startswith("tiny_")]
    assert set(REGISTRY) <= {name for _, _, name in tiny}


def arm(name, value="gain", world="plane"):
    return Arm(name, world, name, "dpo", value=value)


def claim_row(name, seed, values, **more):
    return {f"claim-{name}-{seed}": {"gains": values, "steps": 5, **more}}


def test_a_verdict_is_read_off_the_intervals():
    a, b, c = arm("a"), arm("b"), arm("c")
    rows = {}
    for seed in range(2):
        rows |= claim_row("a", seed, [0.3, 0.5, 0.4]) | claim_row("b", seed, [0.2, 0.2, 0.1])
    ahead, behind = Comparison("ahead", a, b, decides=True), Comparison("behind", b, a, decides=True)
    equal, missing = Comparison("equal", a, a, decides=True), Comparison("missing", a, c, decides=True)
    found = {x.label: claims_table.difference(x, rows) for x in (ahead, behind, equal, missing)}
    assert found["ahead"].value == pytest.approx(0.7 / 3) and found["ahead"].low > 0
    assert found["missing"] is None

    def said(*comparisons):
        return claims_table.outcome([(x, claims_table.difference(x, rows)) for x in comparisons])

    assert said(ahead) == "supported" and said(behind) == "not supported"
    assert said(replace(behind, lower=True)) == "supported"
    assert said(ahead, equal) == "no difference shown" and said(equal, behind) == "not supported"
    assert said(ahead, replace(behind, decides=False)) == "supported"
    assert said(ahead, missing) == "supported (1 of 2 comparisons not made yet)"
    assert said(missing) == "not tested yet"
    rows |= claim_row("d", 0, [0.9, 0.9, 0.8])
    alone = Comparison("alone", arm("d"), a, decides=True)
    assert said(ahead, alone) == "no difference shown (1 of 2 comparisons of one seed)"
    assert said(alone) == "no difference shown (1 of 1 comparisons of one seed)"
    for name, held in (("e", 3), ("f", 5)):
        rows |= claim_row(name, 0, [], memory={"peak": held * 2**20, "weights": 0}, calls={"held": 2.0})
    less = Comparison("less", arm("e", "memory"), arm("f", "memory"), decides=True, lower=True)
    assert said(less) == "supported"  # counted, not sampled
    page = claims_table.text([Claim("m", "M", "needs less", [less, alone])], rows)
    assert "(weights 0.0; 2 held samples) | -2.0 | supported | 5 | 1 |" in page
    assert "| one seed: open | 5 | 1 |" in page
    table = claims_table.text([Claim("x", "X", "beats Y", [ahead, missing], "A note.")], rows)
    assert "## X beats Y: supported (1 of 2 comparisons not made yet)" in table and "A note." in table
    assert (
        "| plane | **ahead** | a: +0.400 | b: +0.167 | +0.233 [+0.100, +0.300] | supported | 5 | 2 |" in table
    )


def test_beta_is_the_smallest_that_stays_on_the_support():
    """Gain falls and support grows with beta; 0.6 is the least beta that stays."""
    trials = claims.search(lambda f: {"factor": f, "gain": 1 / f, "off support": 0.02 if f >= 0.6 else 0.5})
    assert len(trials) == 7 and 0.6 <= claims.best(trials)["factor"] < 0.6 * 4 ** (1 / 8) * 1.01
    gone = claims.search(lambda f: {"factor": f, "gain": 1 / f, "off support": 1 / f})
    assert claims.best(gone)["factor"] == 16
    assert claims.scaled(DPO(beta=10), 0.5) == DPO(beta=5)
    wrapped = claims.scaled(wrap(DPO(beta=10), [{"type": "sdpo"}]), 3)
    assert wrapped.method == DPO(beta=30) and type(wrapped.strategy).__name__ == "SDPO"


def test_the_ends_of_lists(apart):
    batch = claims_list.ends_of_lists(plane_world.PLANE, denoiser_of(plane_world.base()))
    whole = plane_world.drawn(claims_list.lists, 0)
    heights = whole.score.reshape(-1, 4)
    assert torch.equal(batch.x[0::2, 1], heights.max(1).values) and batch.score[:4].tolist() == [1, 0, 1, 0]
    assert torch.equal(batch.x[1::2, 1], heights.min(1).values) and batch.num_groups == len(heights)


def test_turned_round_labels_leave_the_second_opinion_alone(apart):
    network = denoiser_of(plane_world.base())
    clean, wrong = (claims_list.flipped(share)(plane_world.PLANE, network) for share in (0.0, 0.4))
    assert (clean.score != wrong.score).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(clean.extra["reward"], wrong.extra["reward"])
    assert claims_list.flipped_unrated(0.4)(plane_world.PLANE, network).extra == {}


def test_claims_name_arms_once():
    """Two arms of one name are one row, so they must be the same arm but for the value that is read."""
    arms = {}
    for claim in claims_list.CLAIMS():
        assert any(c.decides for c in claim.comparisons)
        for a in (a for c in claim.comparisons for a in c.arms):
            same = replace(a, value="gain", title="")
            assert arms.setdefault(a.name, same) == same


def test_alive_follows_storages():
    with Alive() as alive:
        x = torch.ones(1000)
        y = x.view(10, 100)  # no storage of its own
        z = x + 1
        del z
        w = y * 2
    assert alive.peak == 8000 and alive.now == 8000
    del w
    assert alive.now == 4000


def test_drift_is_the_divergence_of_the_process_of_sampling(monkeypatch):
    """Every prediction of the noise higher by 0.1: a step's KL is (SNR_s - SNR_t) / 2 |x0 - x0'|^2."""
    monkeypatch.setattr(tiny_world, "DRIFT_PROMPTS", 2)
    base, other = (load(ModelConfig("tiny:sdxl")) for _ in range(2))
    assert tiny_world.drift(base, base, "test") == 0
    with torch.no_grad():
        other.network.conv_out.bias += 0.1
    alpha, sigma = other.path.coefficients(other.grid(20, (4, 16, 16))[:-1])
    snr = (alpha / sigma) ** 2
    squared = (0.1 * sigma[:-1] / alpha[:-1]) ** 2 * math.prod(other.latent_shape(32, 32))
    expected = float(((snr[1:] - snr[:-1]) / 2 * squared).sum())
    assert tiny_world.drift(other, base, "test") == pytest.approx(expected, rel=1e-3)


SPREAD = [0.0, 1.0, 2.0, 3.0]
MADE = {"date": "2026-01-01", "machine": "2 cores", "versions": {"torch": "2"}}
START = {"asked": {"prompts": 4}, "scores": dict.fromkeys(over_optimisation_page.MEASURED, SPREAD), **MADE}
RISING = [0.1, 0.2, 0.3, 0.4, 0.5]


def over_rows(arm, seed, trained, held):
    """Make an arm's rows, whose gains are equal for all prompts of a point."""
    return [
        {
            "arm": arm.name,
            "seed": seed,
            "point": i,
            "asked": {"steps": 2**i},
            "compute": over_optimisation_page.FRACTIONS[i],
            "scores": {
                name: (np.array(SPREAD) + (a if name == arm.trained else b)).tolist()
                for name in over_optimisation_page.MEASURED
            },
            "diversity": 0.9,
            "drift": float(i),
            "seconds": 10.0,
            "since": 0,
            **MADE,
        }
        for i, (a, b) in enumerate(zip(trained, held, strict=True))
    ]


def test_the_trained_reward_is_that_of_the_recipe():
    """An arm names the reward that its recipe samples against; the judge has ordered DPO's pairs."""
    for arm in over_optimisation_page.ARMS:
        rollout = tiny_world.recipe(arm.method, arm.flags).rollout
        assert [name.split("*")[-1] for name in rollout.rewards] == ([arm.trained] if rollout.prompts else [])
        assert bool(rollout.prompts) == (arm.name in ("draft", "draft-free", "ddpo", "spo"))
        assert arm.trained not in arm.held_out and len(arm.held_out) == 3


def test_a_stage_ends_at_the_checkpoint_that_is_nearest_to_its_fraction(apart, monkeypatch):
    """At 150 steps in the budget, the fractions are steps 18.75, 37.5, 75, 150 and 300."""
    monkeypatch.setattr(over_optimisation, "cost", lambda run: Calls(tiny_world.ONLINE_BUDGET / 150))
    monkeypatch.setattr(over_optimisation, "round_of", lambda run: 7 if run.method["type"] == "ddpo" else 0)
    found = {}
    for stage in over_optimisation.STAGES:
        run, calls = over_optimisation.planned(stage, 3)
        assert (run.checkpoint.limit, run.training.seed, run.resume) == (0, 3, "latest")
        assert calls * 150 == pytest.approx(tiny_world.ONLINE_BUDGET)
        steps = found.setdefault((stage.name, run.checkpoint.every, run.output), {})
        steps[stage.point] = run.training.steps
    every = {name: (each, [steps[i] for i in range(5)]) for (name, each, _), steps in found.items()}
    assert len(found) == len(every) == len(over_optimisation_page.ARMS)  # an arm's stages have one folder
    assert every["ddpo"] == (7, [21, 35, 77, 147, 301])
    assert every["draft"] == every["dpo"] == (19, [19, 38, 76, 152, 304])


def test_a_stage_goes_on_from_the_last_checkpoint(apart, monkeypatch):
    """A point before the newest checkpoint is there already; the last stage removes the run."""
    made = []

    def align(run, say):
        folder = Path(run.output) / "checkpoints"
        newest = max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)
        made.append((newest, run.training.steps))
        for step in range(newest, run.training.steps, run.checkpoint.every):
            (folder / f"step-{step + run.checkpoint.every}").mkdir(parents=True)
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr(over_optimisation, "align", align)
    monkeypatch.setattr(over_optimisation, "cost", lambda run: Calls(tiny_world.ONLINE_BUDGET / 152))
    scored = []
    monkeypatch.setattr(over_optimisation, "measured", lambda path, _: scored.append(path.name) or {})
    monkeypatch.setattr(over_optimisation, "base", lambda prompts: START)
    monkeypatch.setattr(over_optimisation, "text", lambda start, rows: f"{len(rows)} rows")
    over_optimisation.main(["--arms", "dpo", "--seeds", "1"])
    assert made == [(0, 38), (38, 76), (76, 152), (152, 304)]
    assert scored == ["step-38", "step-76", "step-152", "step-19", "step-304"]
    rows = {row["point"]: row for row in over_optimisation.current()}
    assert [(rows[i]["asked"]["steps"], rows[i]["since"]) for i in range(5)] == [
        (19, 19), (38, 0), (76, 38), (152, 76), (304, 152)
    ]  # fmt: skip
    assert rows[4]["compute"] == 2.0 and not list((record.WORK / "work").glob("overopt-*"))
    over_optimisation.main(["--arms", "dpo", "--seeds", "1"])
    assert len(made) == 4  # the rows are there
    assert (record.HERE / "over_optimisation.md").read_text() == "5 rows"


def test_a_fall_is_from_the_highest_point_on():
    draft, dpo = over_optimisation_page.ARMS[0], over_optimisation_page.ARMS[4]

    def said(trained, held, name="judge"):
        points = over_optimisation_page.course_of(draft, over_rows(draft, 0, trained, held))
        labels = over_optimisation_page.labels_of(points)
        return over_optimisation_page.course(over_optimisation_page.curve(START, points, name), labels)

    fallen = [row for seed in range(2) for row in over_rows(draft, seed, RISING, [0.1, 0.3, 0.2, 0.0, -0.2])]
    gains = over_optimisation_page.curve(START, over_optimisation_page.course_of(draft, fallen), "judge")
    assert gains.shape == (6, 2, 4)
    peak, change = over_optimisation_page.fall(gains)
    assert peak == 2 and (change.value, change.low, change.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert said(RISING, [-value for value in RISING]).startswith("never above the base, falls: -0.500 [")
    assert said(RISING, [0.3, 0.1] + [0.1] * 3).startswith("highest at 1/8, falls: -0.200 [")
    assert said(RISING, RISING) == "highest at the end"
    assert said(RISING, [0.0] * 5).startswith("never above the base, no fall shown: +0.000 [")

    page = over_optimisation_page.text(START, [*fallen, *over_rows(dpo, 0, RISING, RISING)])
    told = "**A sign of over-optimisation**: judge -0.500 [-0.500, -0.500] from compute 1/4 on, the trained"
    assert f"{told} reward +0.300 [+0.300, +0.300]; taste" in page
    absent = [arm.name for arm in over_optimisation_page.ARMS if arm not in (draft, dpo)]
    assert f"Not measured yet, at compute 1/8: {', '.join(absent)}; at compute 1/4" in page
    assert "- dpo: judge (trained on): +0.500 [+0.500, +0.500] at compute 2; no held-out reward is" in page
    assert "| 1/4 | 2 | +0.200 [+0.200, +0.200] | +0.300 [+0.300, +0.300] |" in page
    assert "(of captions alone for an arm with one seed)" in page and "| judge | 1 | 1.61 |" in page


def test_points_are_those_of_the_first_seed_and_seeds_those_that_have_them_all():
    draft = over_optimisation_page.ARMS[0]
    rows = over_rows(draft, 0, RISING, RISING)[1:4] + over_rows(draft, 1, RISING, RISING)[1:3]
    points = over_optimisation_page.course_of(draft, rows)
    assert [[(row["point"], row["seed"]) for row in seeds] for seeds in points] == [
        [(1, 0)],
        [(2, 0)],
        [(3, 0)],
    ]
    assert over_optimisation_page.labels_of(points) == ["base", "1/4", "1/2", "1"]
    absent = over_optimisation_page.missing({draft: points})
    assert absent.startswith("Not measured yet, at compute 1/8: all arms; at compute 1/4: draft-free, ddpo,")
    assert (
        over_optimisation_page.missing(
            {arm: [[{"point": i}] for i in range(5)] for arm in over_optimisation_page.ARMS}
        )
        == ""
    )
    more = [*rows, over_rows(draft, 1, RISING, RISING)[3]]
    assert [len(seeds) for seeds in over_optimisation_page.course_of(draft, more)] == [2, 2, 2]


def test_the_figure_of_over_optimisation_has_the_trained_reward_thick():
    arms = over_optimisation_page.ARMS[0], over_optimisation_page.ARMS[4]
    rows = [row for arm in arms for row in over_rows(arm, 0, RISING, [0.0] * 5)]
    figure = figures_training.rewards(START, rows)
    first, second, _ = figure.axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["draft, 1 seed", "dpo, 1 seed"]
    curves = [line for line in first.lines if line.get_marker() == "o"]
    assert [line.get_linestyle() for line in curves] == ["--", "--", "-", "--"]  # tiny CLIP is the third
    assert curves[2].get_xdata().tolist() == [0, 0.125, 0.25, 0.5, 1, 2]
    assert curves[2].get_ydata().tolist() == pytest.approx(np.array([0, *RISING]) / np.std(SPREAD))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["judge", "taste", "tiny CLIP", "step-aware model", "trained on", "held out"]


def test_the_figure_of_cost_has_a_curve_of_the_judges_gain_for_every_arm():
    """DPO learns from pairs, DDPO from its own samples; SFT has no row, so it has no curve."""
    by_name = {arm.name: arm for arm in over_optimisation_page.ARMS}
    rows = over_rows(by_name["dpo"], 0, RISING, [0.0] * 5)
    sampled = over_rows(by_name["ddpo"], 0, [-gain for gain in RISING], [0.0] * 5)
    rows += [{**made, "asked": {**made["asked"], "rollout": {}}} for made in sampled]
    panels = figures_training.cost(START, rows).axes
    drawn = [[line for line in panel.lines if line.get_marker() == "o"] for panel in panels]
    assert [[line.get_label() for line in lines] for lines in drawn] == [["dpo"], ["ddpo"]]
    assert drawn[0][0].get_ydata().tolist() == pytest.approx(RISING)
    assert drawn[1][0].get_ydata().tolist() == pytest.approx([-gain for gain in RISING])
    budget = tiny_world.ONLINE_BUDGET / 1000
    shares = [fraction * budget for fraction in (0.125, 0.25, 0.5, 1, 2)]
    assert drawn[0][0].get_xdata().tolist() == pytest.approx(shares)


def test_a_method_is_shown_by_images_of_the_base_and_of_its_first_row(apart, monkeypatch):
    """The images of a row that is made are kept, so that the figure does not train again; else it trains."""
    shades, made = iter((0, 60, 120)), []

    @contextmanager
    def trained(name, run):
        made.append((name, run.training.steps))
        yield None, next(shades), 0.0

    def sampled(pipeline, texts, settings=None):
        red = pipeline if isinstance(pipeline, int) else 255  # the base is a pipeline
        return [Image.new("RGB", (32, 32), (red, i, 0)) for i in range(len(texts))]

    monkeypatch.setattr(tiny_world, "trained", trained)
    monkeypatch.setattr(tiny_world, "sampled", sampled)
    monkeypatch.setattr(tiny_world, "cost", lambda run: Calls(tiny_world.BUDGET / 50))
    monkeypatch.setattr(tuning, "chosen", lambda method, world: [])
    recipe = methods.planned("tiny", "dpo", 0, True)[1]
    for _ in range(2):
        strip = tiny_world.strip("tiny-dpo-0", recipe)
    assert made == [("tiny-dpo-0", 50)] and len(strip) == tiny_world.STRIP
    assert [image.getpixel((5, 5)) for image in strip] == [(0, i, 0) for i in range(tiny_world.STRIP)]
    picture = np.asarray(Image.open(io.BytesIO(figures_samples.images("tiny", "dpo"))).convert("RGB"))
    assert made == [("tiny-dpo-0", 50)]  # the kept images
    assert (picture == (255, 0, 0)).all(-1).sum() > 1000  # the base's
    tiny_world.strip("tiny-dpo-0", tiny_world.recipe("dpo", ["--method.beta=7"]))
    assert len(made) == 2  # other settings


def test_a_row_reads_its_cost_once(monkeypatch):
    reads = []

    def cost(run):
        reads.append(run)
        return Calls(tiny_world.BUDGET / 50)

    @contextmanager
    def trained(name, run):
        yield None, None, 1.0

    monkeypatch.setattr(tiny_world, "cost", cost)
    monkeypatch.setattr(tiny_world, "trained", trained)
    monkeypatch.setattr(tiny_world, "_measured", lambda *arguments: {})
    recipe = tiny_world.recipe("dpo")
    rows = [tiny_world.run("tiny-dpo-0", recipe, "test", 8, steps) for steps in (None, 20)]
    assert [(row["steps"], row["compute"]) for row in rows] == [
        (50, pytest.approx(tiny_world.BUDGET)),
        (20, pytest.approx(0.4 * tiny_world.BUDGET)),
    ]
    assert len(reads) == 2


def test_the_page_of_tuning_compares_a_methods_two_rows(apart):
    """DPO is behind IPO with the recipes' settings, and level with it when both are tuned."""
    random = np.random.default_rng(0)

    def seeds(method, gain, **more):
        return [
            row("tiny", method, s, (gain + 0.1 * random.normal(size=200)).tolist(), **more) for s in range(3)
        ]

    told = {"diversity": 0.9, "drift": 1.5}
    held_out = {"taste": [0.2, 0.2], "tiny_clip": [1.0, 2.0]}
    tuned = {"trials": 8, "flags": ["--method.beta=250"], "figures": told, "other gains": held_out}
    record.HERE.mkdir()
    trial = {"world": "tiny", "method": "dpo", "flags": tuned["flags"], "gain": [0.35, 0.3, 0.4]}
    (record.HERE / "tuning.json").write_text(json.dumps({"trials": [trial]}))
    rows = [*seeds("dpo", 0.1), *seeds("dpo", 0.3, **tuned), *seeds("ipo", 0.3), *seeds("ipo", 0.3, **tuned)]
    said = tuned_page.text([*rows, *seeds("sft", 0.1)], ["tiny", "sd3"])
    assert "Not tuned yet: `sft`." in said and "The tiny SD3" not in said
    lines = {line.split(" | ")[0]: line for line in said.splitlines() if "beta=250" in line}
    assert " | 2 to 2 | " in lines["| dpo"] and " | 1 to 2 | " in lines["| dpo"]
    cells = lines["| dpo"].split(" | ")
    assert float(cells[5].split()[0]) == pytest.approx(0.2, abs=0.03)
    assert cells[7] == "+0.350" and cells[8].startswith("3, 3")
    assert re.search(r"\| dpo \| recipe \| \+0\.\d{3} \| \+0\.\d{3} \|  \|  \|", said)
    beside = "+0.200 [+0.200, +0.200] | +1.500 [+1.000, +2.000] | 0.90 | 1.50"
    assert f"| dpo | tuned | {beside} |" in said
    assert "recipes' settings, 1 of 1 pairs are shown to differ" in said and "`ipo` over `dpo` +0.2" in said
    assert "Tuned, 0 of 1 pairs are shown to differ (Holm's correction over all of them, 5%): none." in said
    assert "No method is tuned yet." in tuned_page.text(rows[:3], ["tiny"])


def test_a_tuned_row_stands_beside_the_one_of_the_recipe(apart, monkeypatch):
    """Both are made and kept; a row of older settings of the same kind is not averaged with newer ones."""
    flags, made = ["--method.beta=250"], []

    def run(name, recipe, split, prompts):
        made.append((name, recipe.method["beta"]))
        return {k: v for k, v in row("tiny", "dpo", 0, [0.1]).items() if k not in ("asked", "name", "seed")}

    monkeypatch.setattr(tiny_world, "run", run)
    monkeypatch.setattr(tuning, "chosen", lambda method, world: [[{"flags": flags}] * 3] * 3)
    for tuned in (False, True, True):
        for seed in range(2):
            methods.make("tiny", "dpo", seed, 8, tuned)
    assert made == [("tiny-dpo-0", 1000), ("tiny-dpo-1", 1000)] + [
        (f"tiny-dpo-tuned-{seed}", 250) for seed in range(2)
    ]
    assert [(r["name"], r.get("flags")) for r in methods.current()] == [
        ("tiny-dpo-0", None),
        ("tiny-dpo-1", None),
        ("tiny-dpo-tuned-0", flags),
        ("tiny-dpo-tuned-1", flags),
    ]


def test_the_world_of_64_pixels_trains_the_offline_recipes_of_the_tiny_sdxl_on_its_own_sets():
    names = methods.names("tiny64")
    assert {"dpo", "sft", "ipo", "kto", "rankdpo", "patchdpo"} <= set(names) < set(methods.names("tiny"))
    assert not {"ddpo", "online_dpo", "draft"} & set(names)
    for name, path in {"dpo": "pairs", "kto": "likes", "rankdpo": "lists", "patchdpo": "patches"}.items():
        ours, theirs = (tiny_world.recipe(name, seed=3, world=world) for world in ("tiny64", "tiny"))
        assert (ours.model.path, ours.data.path) == ("tiny:sdxl64", f"tiny:pattern_{path}")
        assert ours.data.resolution == 64
        same = replace(theirs.data, path=ours.data.path, resolution=64)
        assert replace(theirs, model=ours.model, data=same) == ours
    for name in ("smpo", "madpo"):  # whose recipes score their sets by the judge of the other world
        assert tiny_world.recipe(name, world="tiny").data.rewards == ("judge",)
        assert tiny_world.recipe(name, world="tiny64").data.rewards == ("pattern_judge",)
    flagged = tiny_world.recipe("dpo", ["--method.beta=7"], world="tiny64")
    assert flagged.method["beta"] == 7 and flagged.model.path == "tiny:sdxl64"


def test_rows_by_arm_keep_their_order_and_leave_out_the_base():
    rows = [{"arm": "b", "seed": 1}, {"scores": {}}, {"arm": "a", "seed": 0}, {"arm": "b", "seed": 0}]
    assert record.by_arm(rows) == {"b": [rows[0], rows[3]], "a": [rows[2]]}


def test_rows_of_a_world_are_measured_by_its_own_rewards_and_captions():
    assert tiny_world.measures_of(ModelConfig("tiny:sdxl")).rewards == demo.REWARDS
    patterned = tiny_world.measures_of(ModelConfig("tiny:sdxl64"))
    assert patterned.rewards == ("pattern_judge", "pattern_taste") and patterned.side == 64
    assert patterned.prompts("test", 3) == tiny.pattern_prompts("test", 3)
