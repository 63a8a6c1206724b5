"""The fast-slow strategy: the formula by hand, the exchange of adapters, exact resume, a tiny SDXL."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.runs.align import align
from diffalign.runs.validate import read_run
from diffalign.strategies import build, wrap
from diffalign.strategies.fast_slow import FastSlow, Replay, Twin
from diffalign.training.checkpoint import Checkpoints, fingerprint
from diffalign.training.hooks import standard_hooks
from tests.helpers import Affine, sd_path
from tests.strategies.test_strategies import pair_batch
from tests.training.toys import Probe, chase, same, weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_losses_and_gradients_by_hand():
    """Each module's own loss, and the chase with its gradient stopped on the other side."""
    path, batch = sd_path(), pair_batch(3, ties=(1,))
    f, s, r = (torch.tensor(v, dtype=torch.float64) for v in (0.35, 0.3, 0.1))
    f, s = f.requires_grad_(True), s.requires_grad_(True)
    b = torch.tensor(0.02, dtype=torch.float64)
    method = DPO(beta=10.0)
    reference, tally = Affine(path, r, b), torch.zeros(3)
    twin = Twin(Affine(path, f, b), Affine(path, s, b), tally)
    strategy = FastSlow(weight=0.3, scale=2.0, limit=0.5)
    step = strategy.wrap(method)(twin, reference, batch, Streams.at(0, 0, 3))
    got = torch.autograd.grad(step.loss, (f, s))

    def alone(value):
        """(loss, its slope, margins of the two pairs that are no tie, their slopes) of one module."""
        v = value.detach().clone().requires_grad_(True)
        margins = []
        seen = replace(method, loss=lambda chosen, rejected: margins.append(chosen - rejected) or -margins[0])
        seen(Affine(path, v, b), reference, batch, Streams.at(0, 0, 3))
        keep = [0, 2]
        slopes = [torch.autograd.grad(margins[0][i], v, retain_graph=True)[0].item() for i in keep]
        loss = method(Affine(path, v, b), reference, batch, Streams.at(0, 0, 3)).loss
        slope = torch.autograd.grad(loss, v)[0].item()
        return loss.item(), slope, margins[0].detach().numpy()[keep], np.array(slopes)

    (l_f, g_f, m_f, d_f), (l_s, g_s, m_s, d_s) = alone(f), alone(s)
    inside = 2.0 * (m_f - m_s)
    clamped = np.clip(inside, -0.5, 0.5)
    assert step.loss.item() == pytest.approx(l_f + l_s), "the two chases have one value and cancel"
    push = np.where(np.abs(inside) < 0.5, 0.3 * 2.0 * (1 - sigmoid(clamped)), 0.0)
    assert got[0].item() == pytest.approx(g_f - (push * d_f).mean(), rel=1e-7)
    assert got[1].item() == pytest.approx(g_s - (push * d_s).mean(), rel=1e-7)
    assert (push != 0).any()
    assert step.metrics["slow/loss"].item() == pytest.approx(l_s)
    assert step.metrics["loss"].item() == pytest.approx(l_f)
    assert step.metrics["fast_slow/lead"].item() == pytest.approx((m_f - m_s).mean())
    np.testing.assert_allclose(tally.numpy(), [2 * l_f, 2 * l_s, 2], rtol=1e-6)


def test_draws_are_replayed():
    one = Replay(Streams.at(0, 0, 2))
    first = [one.uniform(2), one.normal(2, (3,))]
    one.rewind()
    assert all(torch.equal(a, b) for a, b in zip(first, [one.uniform(2), one.normal(2, (3,))], strict=True))
    assert not torch.equal(one.normal(2, (3,)), first[1])
    assert Replay(torch.Generator()).uniform(4).shape == (4,)


def run_two(folder, steps=9, every=3, ema=0.0, resume=None, hooks=()):
    settings = TrainingConfig(steps=steps, batch_size=4, ema_decay=ema)
    optimizer = OptimizerConfig(learning_rate=1e-2)
    checkpoints = Checkpoints(folder, 3, fingerprint(settings, optimizer, 1))
    usual = lambda extra: standard_hooks(  # noqa: E731
        folder, LoggingConfig(every=1, trackers=()), CheckpointConfig(every=4), checkpoints, [*hooks, *extra]
    )
    return chase(settings, optimizer, every=every, hooks=usual, resume=checkpoints.start(resume))


def test_the_better_one_leads_and_takes_its_moments_along(tmp_path):
    seen = []

    def look(state):
        moments = {n: state.optimizer.state[p]["exp_avg"].clone() for n, p in state.parameters}
        seen.append((weights(state), moments, {n: a.clone() for n, a in state.ema.state_dict().items()}))

    state = run_two(tmp_path, steps=3, ema=0.5, hooks=[Probe(look)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    fast, slow = (sum(row[name] for row in rows) for name in ("loss", "slow/loss"))
    exchanged = [row["fast_slow/exchanged"] for row in rows if "fast_slow/exchanged" in row]
    assert exchanged == [float(slow < fast)]
    assert slow < fast, "this seed's slow module does better, or nothing is tested"
    before = seen[-1]
    after = (
        weights(state),
        {n: state.optimizer.state[p]["exp_avg"] for n, p in state.parameters},
        state.ema.state_dict(),
    )
    for old, new in zip(before, after, strict=True):
        for name in old:
            fellow = name.replace("fast.", "?").replace("slow.", "fast.").replace("?", "slow.")
            assert torch.equal(new[name], old[fellow]), name


def test_resuming_is_exact(tmp_path):
    whole = run_two(tmp_path / "whole")
    run_two(tmp_path / "parts", steps=4)
    again = run_two(tmp_path / "parts", resume="latest")
    assert again.start_step == 4 and same(weights(whole), weights(again))


def test_what_it_refuses(tmp_path):
    with pytest.raises(
        UserError, match=r"strategies\[0\].type='fast_slow' wraps two policies; allowed: as the"
    ):
        build([{"type": "fast_slow"}, {"type": "sft"}])
    with pytest.raises(UserError, match="SFT has no beta"):
        wrap(SFT(), [{"type": "fast_slow"}])
    with pytest.raises(UserError, match=r"fast_slow.every=0"):
        FastSlow(every=0)
    path = sd_path()
    a = Affine(path, torch.tensor(0.1, requires_grad=True), torch.tensor(0.0))
    with pytest.raises(UserError, match="there is one policy"):
        FastSlow().wrap(DPO())(a, a, pair_batch(), torch.Generator())
    run = replace(read_run("tiny_sdxl_dpo"), output=str(tmp_path), strategies=({"type": "fast_slow"},))
    for changed, words in (
        (
            replace(run, model=replace(run.model, train="full")),
            "model.train='full' with the strategy fast_slow",
        ),
        (replace(run, model=replace(run.model, gradient_checkpointing=True)), "gradient_checkpointing=True"),
        (replace(run, training=replace(run.training, reference_every=2)), "reference_every=2 with"),
    ):
        with pytest.raises(UserError, match=words):
            align(changed, lambda line: None)


def test_two_sets_of_adapters_on_the_tiny_sdxl(tmp_path):
    """Both train, differ, share the start, and only the leading one is exported."""
    run = read_run("tiny_sdxl_dpo")
    strategies = ({"type": "sdpo"}, {"type": "fast_slow", "every": 2, "weight": 0.5})
    run = replace(
        run,
        output=str(tmp_path / "run"),
        strategies=strategies,
        model=replace(run.model, lora=replace(run.model.lora, targets=("to_q", "to_v"))),
        data=replace(run.data, limit=24, holdout=0.1, cache_batch_size=16),
        training=replace(run.training, steps=3, batch_size=4),
        logging=replace(run.logging, every=1, diagnostics_bins=1, trackers=()),
    )
    result = align(run, lambda line: None)
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "slow/loss" in row]
    assert steps[0]["loss"] == steps[0]["slow/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[0]["fast_slow/lead"] == 0.0 and steps[2]["loss"] != steps[2]["slow/loss"]
    assert "sdpo/lambda" in steps[0] and any("fast_slow/exchanged" in row for row in rows)
    trained = load_file(result.output / "checkpoints" / "step-3" / "trainable.safetensors")
    first = {n for n in trained if ".default" in n}
    assert {n.replace(".second", ".default") for n in trained if ".second" in n} == first
    saved = load_file(result.aligned / "pytorch_lora_weights.safetensors")
    factors = [name for name in saved if not name.endswith(".alpha")]
    assert len(factors) == len(first) and not any("second" in name for name in saved)
    assert any("heldout/rewards/margins" in row for row in rows), "the leading one is measured"
