"""Online runs of one of two experts: both sample, one learns, at its times."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from diffalign.diffusion.randomness import Streams, derive, normal
from diffalign.errors import UserError
from diffalign.estimate.estimate import estimate
from diffalign.models.loading import load
from diffalign.models.precision import only_errors
from diffalign.runs.align import align
from diffalign.runs.micro_batch import workload_of
from diffalign.utils.text import read_json_lines
from tests.runs.halves import silent
from tests.runs.test_video_rollouts import parts_of, rows_of
from tests.runs.video_worker import run_of
from tests.video_pipelines import make_wan_a14b

BOUNDARY = 0.875
GRID = {"high": [1.0, 0.9], "low": [0.75]}  # starts of the steps that are draws: of 1, 0.9, 0.75, 0.5, 0


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    with only_errors("diffusers"):
        return str(make_wan_a14b(tmp_path_factory.mktemp("a14b")))


def configured(path, output, method, expert, **rollout):
    run = run_of(path, output, method, steps=4, **rollout)
    training = replace(run.training, steps=2)
    checkpoint = replace(run.checkpoint, every=2)
    return replace(run, model=replace(run.model, expert=expert), training=training, checkpoint=checkpoint)


@pytest.fixture
def calls(monkeypatch):
    """Record (whether it has adapters, whether with gradient, the time that it is told) of each call."""
    seen, forward = [], WanTransformer3DModel.forward

    def recording(self, hidden_states, timestep, *rest, **others):
        adapted = bool(getattr(self, "peft_config", None))
        seen.append((adapted, torch.is_grad_enabled(), float(timestep.min()), float(timestep.max())))
        return forward(self, hidden_states, timestep, *rest, **others)

    monkeypatch.setattr(WanTransformer3DModel, "forward", recording)
    return seen


@pytest.mark.parametrize("expert", GRID)
@pytest.mark.parametrize("method", ["flow_grpo", "dpo"])
def test_both_sample_and_the_trained_one_learns_at_its_times(a14b, tmp_path, calls, method, expert):
    result = align(configured(a14b, tmp_path / "run", method, expert), silent)
    assert any(not adapted for adapted, *_ in calls) and any(grad for _, grad, *_ in calls)
    for adapted, grad, low, high in calls:
        above = low >= 1000 * BOUNDARY
        assert above == (high >= 1000 * BOUNDARY) == (adapted == (expert == "high")), "each at its times"
        assert adapted or not grad, "the other is frozen"
    first = rows_of(result.output)[0]
    if method == "flow_grpo":
        assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-5)
        found = parts_of(result.output)
        # told whole thousandths: starts of steps as the stock scheduler has them
        assert found["t"][0, :, 0].tolist() == pytest.approx(GRID[expert], abs=1e-3)
        assert found["s"].shape == found["t"].shape == (2, len(GRID[expert]), 2)
    else:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    learned = load_file(result.output / "checkpoints" / "step-2" / "trainable.safetensors")
    assert all(bool(value.any()) for name, value in learned.items() if "lora_B" in name)
    part = "high_noise" if expert == "high" else "low_noise"
    assert {p.name for p in (result.output / "aligned").iterdir()} == {"README.md", part}


def test_the_estimate_knows_the_weights_in_memory(a14b, tmp_path, monkeypatch):
    """The frozen weights of both experts, which lie there throughout the run."""
    run = configured(a14b, tmp_path / "run", "dpo", "low")
    loaded = []

    def loading(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr("diffalign.runs.align.load", loading)
    align(run, silent)
    (model,) = loaded
    held = sum(p.nbytes for n in model.networks.values() for p in n.parameters() if not p.requires_grad)
    told = estimate(workload_of(run)).memory
    assert told["frozen weights"] == told["frozen weights of the other expert"] == held // 2


def test_samples_are_those_of_the_stock_pipeline(a14b, tmp_path):
    """Without noise in the steps (eta 0) a round's samples are the two experts' by Euler's method."""
    result = align(configured(a14b, tmp_path / "run", "dpo", "high", eta=0.0), silent)
    found, prompts = parts_of(result.output), read_json_lines(
        result.output / "rollouts" / "round-000000" / "scores.jsonl"
    )  # fmt: skip
    with only_errors("diffusers"):
        model = load(replace(configured(a14b, tmp_path, "dpo", None).model, lora=None))
    final = found["x"].flatten(0, 2)
    cond = model.encode_prompts([line["prompt"] for line in prompts for _ in range(2)])
    times, x = model.grid(4, tuple(final.shape[1:])).float(), initial(final.shape)
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            network = model.pipeline.transformer if t >= BOUNDARY else model.pipeline.transformer_2
            told = model.path.model_time(t[None].expand(len(x)))
            x = x + (s - t) * network(x, told, cond["encoder_hidden_states"], return_dict=False)[0]
    torch.testing.assert_close(final, x, rtol=1e-3, atol=1e-3)


def initial(shape):
    """Return the noise of a round's samples, which begins the stream of its prompt."""
    random = Streams([derive(0, "rollout", row) for row in range(2)])
    return normal(random, 2, (2, *shape[1:])).flatten(0, 1)


def test_a_run_of_the_second_samples_with_what_the_first_learned(a14b, tmp_path, monkeypatch):
    """The first run's adapters are on the other expert while the second samples."""
    first = align(configured(a14b, tmp_path / "high", "dpo", "high"), silent)
    second = configured(str(first.output), tmp_path / "low", "dpo", "low")
    adapted = set()
    forward = WanTransformer3DModel.forward

    def recording(self, hidden_states, timestep, *rest, **others):
        if float(timestep.min()) >= 1000 * BOUNDARY:
            adapted.add(bool(getattr(self, "peft_config", None)))
        return forward(self, hidden_states, timestep, *rest, **others)

    monkeypatch.setattr(WanTransformer3DModel, "forward", recording)
    result = align(second, silent)
    assert adapted == {True}
    assert {p.name for p in (result.output / "aligned").iterdir()} == {"README.md", "high_noise", "low_noise"}


@pytest.mark.parametrize(
    ("method", "rollout", "changes", "words"),
    [
        ("spo", {}, {}, r"a tree with model.expert=high; allowed: rollout.shape trajectories"),
        ("flow_grpo", {"window": 1}, {}, r"rollout.window=1 with model.expert=high; allowed: None"),
        ("diffusion_nft", {}, {}, r"model.expert=high with method diffusion_nft.*such as flow_grpo"),
        ("awm", {}, {}, r"model.expert=high with method awm"),
        ("dpo", {"shape": "tree"}, {}, r"rollout.shape='tree' with method dpo"),
        ("flow_grpo", {}, {"train": "full"}, r"model.train='full' with model.expert=high; allowed: 'lora'"),
    ],
)
def test_what_an_expert_does_not_do_online_is_refused(a14b, tmp_path, method, rollout, changes, words):
    run = configured(a14b, tmp_path / "run", method, "high", **rollout)
    with pytest.raises(UserError, match=words):
        align(replace(run, model=replace(run.model, **changes)), silent)


def test_a_sampler_without_a_step_of_the_expert_is_an_error_that_names_its_times(a14b, tmp_path):
    run = configured(a14b, tmp_path / "run", "flow_grpo", "low")
    run = replace(run, rollout=replace(run.rollout, steps=1))
    with pytest.raises(
        UserError, match=r"rollout.steps=1: none of the steps .* 0 to 0.875 of model.expert=low"
    ):
        align(run, silent)
