"""The reference follows the policy: where it stands, exactly resumed, under LoRA a second set of adapters."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig
from diffalign.errors import UserError
from diffalign.runs.align import align
from diffalign.runs.validate import read_run
from diffalign.training.checkpoint import Checkpoints, fingerprint
from diffalign.training.hooks import standard_hooks
from diffalign.training.reference import RefreshReference
from tests.training.toys import Probe, Trial, same, weights

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def trial(every, mix, steps=6, hooks=(), **changes):
    run = Trial(settings=TrainingConfig(steps=steps, batch_size=4), optimizer=OPTIMIZER, **changes)
    run.kept = {name: p.detach() for name, p in run.reference.named_parameters()}
    run.hooks = [RefreshReference(run.kept, every, mix), *hooks]
    return run


@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_the_reference_moves_by_the_formula_when_it_is_due(mix):
    seen = []
    run = trial(2, mix)
    begin = {name: p.clone() for name, p in run.kept.items()}
    held = lambda: {name: p.clone() for name, p in run.kept.items()}  # noqa: E731
    run.hooks = [*run.hooks, Probe(lambda state: seen.append((weights(state), held())))]
    run.run()
    expected = begin
    for step, (policy, reference) in enumerate(seen, 1):
        if step % 2 == 0:
            expected = {n: (1 - mix) * expected[n] + mix * policy[n] for n in expected}
        assert all(torch.allclose(reference[n], expected[n], rtol=0, atol=1e-15) for n in expected), step
    if mix == 1:
        assert same(seen[-1][0], seen[-1][1])


def test_margins_are_against_the_reference_as_it_stands():
    """The step after a hard refresh starts from log 2, as the first step of a run does."""
    losses = []
    run = trial(2, 1.0, moved=False, hooks=[Probe(lambda state: losses.append(state.loss))])
    run.run()
    start = pytest.approx(0.6931471805599453, abs=1e-12)
    assert losses[0] == losses[2] == losses[4] == start and losses[1] != start


@pytest.mark.parametrize("mix", [1.0, 0.5])
def test_resuming_is_exact_with_the_reference_in_the_checkpoint(tmp_path, mix):
    def run(folder, steps, resume=None):
        settings = TrainingConfig(steps=steps, batch_size=4)
        checkpoints = Checkpoints(folder, 2, fingerprint(settings, OPTIMIZER, 1))
        extra = standard_hooks(folder, LoggingConfig(trackers=()), CheckpointConfig(every=5), checkpoints)
        this = trial(3, mix, steps, hooks=extra)
        this.resume = checkpoints.start(resume)
        return this, this.run()

    whole, state = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 5)
    resumed, again = run(tmp_path / "parts", 10, "latest")
    assert again.start_step == 5 and same(weights(state), weights(again)) and same(whole.kept, resumed.kept)
    assert same(load_file(tmp_path / "parts" / "step-10" / "kept.safetensors"), resumed.kept)


def test_a_checkpoint_without_the_reference_is_refused(tmp_path):
    settings = TrainingConfig(steps=2, batch_size=4)
    checkpoints = Checkpoints(tmp_path, 2, fingerprint(settings, OPTIMIZER, 1))
    hooks = standard_hooks(tmp_path, LoggingConfig(trackers=()), CheckpointConfig(), checkpoints)
    Trial(settings=settings, optimizer=OPTIMIZER, hooks=hooks).run()
    other = trial(1, 1.0)
    other.resume = checkpoints.load("latest")
    with pytest.raises(UserError, match="holds other tensors than this run: 6 differ"):
        other.run()


def test_settings_out_of_range():
    for arguments, words in (
        ((0, 1.0), "reference_every=0"),
        ((1, 0.0), "reference_mix=0"),
        ((1, 1.5), "mix"),
    ):
        with pytest.raises(UserError, match=words):
            RefreshReference({}, *arguments)
    run = trial(1, 1.0)
    run.hooks = [RefreshReference({}, 1)]
    with pytest.raises(ValueError, match="differ in 6 tensors"):
        run.run()


def small(output, steps=4, **changes):
    run = read_run("tiny_sdxl_dpo")
    return replace(
        run,
        output=str(output),
        data=replace(run.data, limit=40, holdout=0.1, cache_batch_size=16),
        training=replace(run.training, steps=steps, batch_size=4, reference_every=2),
        logging=replace(run.logging, every=1, diagnostics_bins=2, trackers=()),
        checkpoint=replace(run.checkpoint, every=2, limit=5),
        **changes,
    )


def silent(line):
    pass


def losses(result):
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], rows


@pytest.mark.parametrize("dora", [False, True])
def test_under_lora_it_is_a_second_set_of_adapters(tmp_path, dora):
    """With dropout, which only the policy has: policy == reference is log 2 in evaluation alone."""
    run = small(tmp_path / "run")
    lora = replace(run.model.lora, dora=dora, targets=("to_q", "to_k"))
    run = replace(run, model=replace(run.model, lora=lora))
    result = align(run, silent)
    values, rows = losses(result)
    assert values[0] == pytest.approx(0.693147, abs=1e-6) and values[2] == pytest.approx(0.693147, abs=1e-6)
    assert values[1] != values[0]
    last = result.output / "checkpoints" / "step-4"
    policy, kept = load_file(last / "trainable.safetensors"), load_file(last / "kept.safetensors")
    assert same(policy, kept), "refreshed at step 4"
    assert all(".default" in name for name in policy)
    before = load_file(result.output / "checkpoints" / "step-2" / "kept.safetensors")
    assert not same(before, kept)
    saved = load_file(result.aligned / "pytorch_lora_weights.safetensors")
    factors = [name for name in saved if not name.endswith(".alpha")]
    assert len(factors) == len(policy) and not any("reference" in name for name in saved)
    held_out = [row for row in rows if "heldout/rewards/margins" in row]
    assert held_out[-1]["heldout/rewards/margins"] != 0.0, "held-out pairs are held against the base"

    parts = replace(run, output=str(tmp_path / "parts"))
    align(replace(parts, training=replace(run.training, steps=3)), silent)
    again = align(replace(parts, resume="latest"), silent)
    for name in ("trainable.safetensors", "kept.safetensors"):
        assert (last / name).read_bytes() == (again.output / "checkpoints" / "step-4" / name).read_bytes()


def test_a_reference_adapter_has_no_dropout_and_leaves_the_policy_trainable(tmp_path):
    from diffalign.models.loading import load
    from diffalign.models.lora import following_reference, policy_denoiser, prepare_policy

    run = small(tmp_path / "run")
    config = replace(run.model, lora=replace(run.model.lora, dropout=0.5, targets=("to_q",)))
    model = load(config)
    trained = prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    reference, kept = following_reference(model, policy, config)
    assert {name for name, _ in trained} == {
        n for n, p in model.network.named_parameters() if p.requires_grad
    }
    assert kept.keys() == dict(trained).keys()
    with torch.no_grad():
        for _, p in trained:
            p.add_(0.1 * torch.randn_like(p))
    x, t = torch.randn(2, *model.latent_shape(32, 32)), torch.tensor([0.3, 0.6])
    cond = model.encode_prompts(["a", "b"])
    cond |= model.family.micro_conditions(*(torch.full((2, 2), 32.0) for _ in range(3)))
    once, twice = reference(x, t, cond), reference(x, t, cond)
    assert torch.equal(once, twice), "no dropout in a network that trains"
    from diffalign.models.denoisers import AdaptersOff

    assert torch.equal(once, AdaptersOff(policy, model.network)(x, t, cond)), "the base, to the bit"
    for name, p in trained:
        kept[name].copy_(p.detach())
    model.network.eval()
    assert torch.equal(reference(x, t, cond), policy(x, t, cond))
    assert not reference(x, t, cond).requires_grad and policy(x, t, cond).requires_grad


def test_under_full_fine_tuning_the_frozen_copy_moves(tmp_path):
    run = small(tmp_path / "run")
    run = replace(run, model=replace(run.model, train="full"))
    run = replace(run, optimizer=replace(run.optimizer, learning_rate=1e-5))
    result = align(run, silent)
    values, rows = losses(result)
    assert values[0] == pytest.approx(0.693147, abs=1e-6) and values[2] == pytest.approx(0.693147, abs=1e-6)
    last = result.output / "checkpoints" / "step-4"
    assert same(load_file(last / "trainable.safetensors"), load_file(last / "kept.safetensors"))
    held_out = [row for row in rows if "heldout/rewards/margins" in row]
    assert len(held_out) == 1 and held_out[0]["heldout/rewards/margins"] != 0.0, "measured before the move"


def test_a_method_without_reference_cannot_refresh_it(tmp_path):
    with pytest.raises(UserError, match="reference_every=2: method sft has no reference"):
        align(replace(small(tmp_path / "run"), method={"type": "sft"}), silent)


def test_strategies_of_a_run_act_and_held_out_pairs_measure_the_method(tmp_path):
    """The value of SDPO's loss is the method's, its steps are not; the report holds DPO's own numbers."""
    run = small(tmp_path / "plain")
    run = replace(run, training=replace(run.training, reference_every=0))
    plain, _ = losses(align(run, silent))
    strategies = ({"type": "sdpo", "mu": 0.9}, {"type": "anchor", "alpha": 0.5})
    safe, rows = losses(align(replace(run, output=str(tmp_path / "safe"), strategies=strategies), silent))
    assert safe[0] == plain[0] == pytest.approx(0.693147, abs=1e-6) and safe[3] != plain[3]
    assert 0 < rows[0]["sdpo/lambda"] <= 1 and rows[0]["anchor"] == 0.0
    held_out = next(row for row in rows if "heldout/loss" in row)
    assert not any("sdpo" in name or "anchor" in name for name in held_out if name.startswith("heldout"))
    recorded = read_run(tmp_path / "safe" / "config.yaml").strategies  # every default spelled out
    assert recorded == ({"type": "sdpo", "mu": 0.9, "over": "batch"}, {"type": "anchor", "alpha": 0.5})
    with pytest.raises(UserError, match="strategies is"):
        align(replace(run, output=str(tmp_path / "safe"), resume="latest"), silent)
