"""Online runs on the embedded tiny SDXL: what they leave, that they resume exactly, and rounds by people."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config.io import to_yaml
from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
)
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.samplers import grid_of
from diffalign.errors import UserError
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.rollout.source import OnlineSource
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.runs.rollouts import _check_windows, _claim, plan_of, steps_of_a_round
from diffalign.runs.validate import read_run
from diffalign.types import Path as NoisingPath
from diffalign.utils.text import read_json_lines
from tests.helpers import sd_path
from tests.training.toys import Probe

RECIPES = {"d3po": "loss", "ddpo": "ratio", "spo": "loss", "online_dpo": "loss"}
STEPS = 3  # of the sampler, and so optimizer steps of a round of D3PO and DDPO


def silent(line):
    pass


def small(output, recipe, steps=4, **rollout):
    """Two prompts a round, both in each micro-batch; the size of a file breaks the judge's many ties."""
    run = read_run(f"tiny_sdxl_{recipe}")
    few = {"prompts_per_round": 2, "samples": 2, "steps": STEPS, "first_branch": 1, "passes": 1}
    few |= {"lowest_time": 0.0} | ({} if recipe == "spo" else {"rewards": ("judge", "0.01*jpeg")})
    return replace(
        run,
        output=str(output),
        rollout=replace(run.rollout, **few | {"batch_size": 2} | rollout),
        training=replace(run.training, steps=steps, batch_size=2),
        logging=replace(run.logging, every=1, trackers=()),
        checkpoint=replace(run.checkpoint, every=6, limit=5),
        validation=replace(run.validation, every=0, rewards=()),
    )


def records(output):
    return [row for row in read_json_lines(Path(output) / "metrics.jsonl") if "loss" in row]


def trained(output, step):
    return (Path(output) / "checkpoints" / f"step-{step}" / "trainable.safetensors").read_bytes()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Four steps of D3PO, of which the last is of a second round, with a second opinion half-way."""
    run = small(tmp_path_factory.mktemp("runs") / "whole", "d3po")
    watched = replace(
        run.validation, every=2, prompts=("a small red circle",), sampling_steps=2, rewards=("taste",)
    )
    return run, align(replace(run, validation=watched), silent)


@pytest.mark.parametrize("recipe", ["ddpo", "spo", "online_dpo"])
def test_a_recipe_runs_and_its_first_step_knows_no_difference(recipe, tmp_path):
    result = align(small(tmp_path / "run", recipe, steps=2), silent)
    assert (result.steps, result.interrupted, result.waiting) == (2, False, "")
    check_first_step(recipe, result)


def test_a_run_leaves_what_it_should(done):
    run, result = done
    check_first_step("d3po", result)
    rows = records(result.output)
    assert [row["rollout/round"] for row in rows if "rollout/round" in row] == [0, 1]
    assert [row["rollout/images"] for row in rows if "rollout/images" in row] == [4, 8]
    judged = read_json_lines(result.output / "rollouts" / "round-000000" / "scores.jsonl")
    mean = torch.tensor([line["judge"] for line in judged]).mean()
    assert rows[0]["rollout/judge"] == pytest.approx(float(mean), rel=1e-6)
    assert "mean rewards of the samples, round 0 to 1: judge" in result.verdict
    assert result.counts == "8 images sampled for prompts of tiny:train"
    assert "D3PO" in (result.output / "aligned" / "README.md").read_text()
    assert read_run(result.output / "config.yaml").rollout == run.rollout


def check_first_step(recipe, result):
    """Policy, reference and whoever sampled are one; what is left loads in plain diffusers."""
    first = records(result.output)[0]
    if recipe == "ddpo":
        assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["loss"] == pytest.approx(0, abs=1e-3)
    else:
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    if recipe != "online_dpo":
        assert first["kl"] == pytest.approx(0, abs=1e-6)
    from diffusers import StableDiffusionXLPipeline

    from diffalign.tiny import pipeline_path

    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_path("sdxl"))
    pipeline.load_lora_weights(str(result.aligned))
    moved = [p for name, p in pipeline.unet.named_parameters() if "lora_B" in name]
    assert moved and all(bool(p.any()) for p in moved)


def test_validation_rewards_are_written(done):
    _, result = done
    whole = json.loads((result.output / "validation.json").read_text())
    assert set(whole["settings"]["rewards"]) == {"judge", "jpeg", "taste"}
    assert whole["settings"]["trained"] == ["judge", "jpeg"]
    assert [entry["step"] for entry in whole["history"]["entries"]] == [0, 2, 4]


@pytest.mark.parametrize("how", ["steps", "signal", "killed"])
def test_a_run_in_two_parts_is_one_to_the_bit(how, done, tmp_path, monkeypatch):
    """Two steps are inside a round of three; or it is killed in the middle of sampling the second round."""
    import diffalign.runs.align as job

    run, result = done
    run = replace(run, output=str(tmp_path / "run"), checkpoint=CheckpointConfig(every=STEPS))
    if how == "steps":
        first = align(replace(run, training=replace(run.training, steps=2)), silent)
        assert (first.steps, first.interrupted) == (2, False)
    elif how == "signal":
        stop = Probe(lambda state: state.step == 1 and os.kill(os.getpid(), signal.SIGINT))
        hooks = job.standard_hooks
        with monkeypatch.context() as patched:
            patched.setattr(job, "standard_hooks", lambda *a, **k: [stop, *hooks(*a, **k)])
            first = align(run, silent)
        assert (first.steps, first.interrupted, first.aligned) == (2, True, None)
    else:
        with dying(monkeypatch, decodes=3), pytest.raises(SystemError):
            align(run, silent)
    second = align(replace(run, resume="latest"), silent)
    assert second.steps == 4 and trained(second.output, 4) == trained(result.output, 4)
    keep = lambda row: {k: v for k, v in row.items() if k in ("step", "loss", "kl", "grad_norm")}  # noqa: E731
    assert [keep(row) for row in records(second.output)] == [keep(row) for row in records(result.output)]


class dying:  # noqa: N801
    """A process that dies in the decoder, after so many decoded parts."""

    def __init__(self, monkeypatch, decodes):
        self.patch, self.left = monkeypatch.context(), decodes

    def __enter__(self):
        decode = PipelineRolloutModel.decode

        def counted(studio, latents):
            self.left -= 1
            if self.left < 0:
                raise SystemError
            return decode(studio, latents)

        self.patch.__enter__().setattr(PipelineRolloutModel, "decode", counted)

    def __exit__(self, *error):
        return self.patch.__exit__(*error)


def label(folder, scores):
    """Fill a labels file in, as a person would."""
    path = folder / "labels.jsonl"
    lines = [json.loads(line) | {"scores": scores} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(monkeypatch):
    """Record the rows of each part that is sampled from now on."""
    found, sampled = [], OnlineSource._sampled

    def noted(source, number, rows, *rest):
        found.append((number, list(rows)))
        return sampled(source, number, rows, *rest)

    monkeypatch.setattr(OnlineSource, "_sampled", noted)
    return found


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_rounds_that_people_judge(tmp_path, monkeypatch, capfd):
    """By the command line: wait, label, train a round, wait; killed while it draws the second round."""
    run = small(tmp_path / "run", "d3po", steps=2 * STEPS, by="people", page=False, rewards=())
    run = replace(
        run,
        training=replace(run.training, reference_every=STEPS),
        checkpoint=CheckpointConfig(every=STEPS, limit=5),
    )
    parts, output = drawn(monkeypatch), Path(run.output)
    config = tmp_path / "people.yaml"
    config.write_text(to_yaml(run))
    again = ["train", str(output / "config.yaml"), "--resume", "latest"]
    assert main(["train", str(config)]) == 0
    said = capfd.readouterr().err
    rounds = [output / "rollouts" / f"round-00000{number}" for number in range(2)]
    assert "after step 0: 0 of 2 prompts labelled in labels.jsonl" in said and str(rounds[0]) in said
    assert f"diffalign train {output}/config.yaml --resume latest" in said
    assert sorted(pictures(rounds[0])) == [f"000{n}-{k}.png" for n in range(2) for k in range(2)]
    with pytest.raises(UserError, match="--resume latest"):
        align(run, silent)

    parts.clear()
    assert main(again) == 0  # nothing has been labelled: nothing happens
    assert "after step 0: 0 of 2 prompts" in capfd.readouterr().err and not parts
    label(rounds[0], [1, 0])
    shutil.copytree(output, tmp_path / "control")
    with dying(monkeypatch, decodes=1), pytest.raises(SystemError):
        main(again)
    assert parts == [(1, [0]), (1, [1])] and not list(rounds[1].glob("labels*"))
    parts.clear()
    waiting = align(replace(run, resume="latest"), silent)
    assert (waiting.steps, waiting.interrupted, waiting.aligned) == (STEPS, True, None)
    assert "0 of 2 prompts labelled" in waiting.waiting and parts == [(1, [1])]
    checkpoint = output / "checkpoints" / f"step-{STEPS}"
    policy, reference = (load_file(checkpoint / f"{n}.safetensors") for n in ("trainable", "kept"))
    assert len(reference) == len(policy) > 0
    assert all(torch.equal(a, b) for a, b in zip(policy.values(), reference.values(), strict=True))

    control = replace(run, output=str(tmp_path / "control"), resume="latest")
    assert align(control, silent).waiting
    other = tmp_path / "control" / "rollouts" / "round-000001"
    assert pictures(rounds[1]) == pictures(other)
    assert (rounds[1] / "labels.jsonl").read_text() == (other / "labels.jsonl").read_text()

    label(rounds[1], [0, 1])
    finished = align(replace(run, resume="latest"), silent)
    assert (finished.steps, finished.waiting) == (2 * STEPS, "") and finished.aligned is not None
    rows = records(output)
    for first in (rows[0], rows[STEPS]):  # each round is held against the policy that drew it
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4) and first["kl"] == pytest.approx(
            0, abs=1e-6
        )
    assert rows[-1]["kl"] > 0 and rows[0]["rollout/people"] == 0.5


def offline_or_online(method, training=None, every=500, strategies=(), frames=None, **rollout):
    settings = {"prompts": "tiny:train", "rewards": ("judge",)} | rollout
    return Run(
        method={"type": method},
        strategies=strategies,
        data=DataConfig(frames=frames),
        rollout=RolloutConfig(**settings),
        training=training or TrainingConfig(),
        checkpoint=CheckpointConfig(every=every),
    )


@pytest.mark.parametrize(
    ("method", "rollout", "words"),
    [
        ("d3po", {"prompts": ""}, ["d3po learns from rollouts", "rollout.prompts is empty", "tiny:train"]),
        ("d3po", {"shape": "samples"}, ["rollout.shape='samples'", "allowed: trajectories, tree"]),
        ("dpo", {"shape": "tree"}, ["rollout.shape='tree'", "method dpo", "allowed: samples"]),
        ("spo", {"rewards": ()}, ["rollout.rewards is empty", "rollout.by people"]),
        (
            "d3po",
            {"strategies": ({"type": "sdpo"},)},
            ["strategies with method d3po", "allowed with it: none"],
        ),
        ("ddpo", {"eta": 0.0, "advantage": "group"}, ["rollout.eta=0.0", "ddpo: more than 0"]),
        ("dpo", {"eta": 0.0}, ["shared_noise=True with rollout.eta=0", "shared_noise false"]),
        ("d3po", {"samples": 1}, ["rollout.samples=1", "2 or more"]),
        ("spo", {"samples": 1}, ["rollout.samples=1", "2 or more candidates"]),
        ("spo", {"first_branch": 20}, ["rollout.first_branch=20", "less than rollout.steps=20"]),
        ("spo", {"combine": "pareto"}, ["'pareto'", "tree", "sum, wins"]),
        ("dpo", {"combine": "pareto"}, ["'pareto'", "method dpo", "sum, wins"]),
        ("ddpo", {"combine": "pareto", "advantage": "group"}, ["'pareto'", "ddpo", "sum, wins"]),
        ("ddpo", {}, ["rollout.advantage='none'", "ddpo", "group, group_std, group_batch, batch"]),
        ("d3po", {"advantage": "group"}, ["rollout.advantage='group'", "d3po", "allowed: none"]),
        ("ddpo", {"advantage": "batch", "shape": "tree"}, ["rollout.advantage='batch'", "tree"]),
        ("spo", {"by": "people"}, ["rollout.by='people'", "samples and trajectories"]),
        ("ddpo", {"window": 20, "advantage": "group"}, ["rollout.window=20", "less than rollout.steps=20"]),
        (
            "ddpo",
            {"window": 4, "lowest_time": 0.1, "advantage": "group"},
            ["rollout.lowest_time=0.1 with rollout.window=4", "allowed: 0"],
        ),
        ("d3po", {"part": 1}, ["rollout.part=1 with method d3po", "allowed: null"]),
        (
            "dgpo",
            {"part": 1, "advantage": "group_std", "eta": 0.0, "shared_noise": False},
            ["part=1", "dgpo"],
        ),
        ("ddpo", {"part": 3, "samples": 4, "advantage": "group"}, ["part=3", "divisor of rollout.samples=4"]),
        ("awm", {"prompts": ""}, ["awm learns from rollouts", "rollout.prompts is empty"]),
        ("spo", {"window": 4}, ["rollout.window=4 with a tree", "allowed: null"]),
        ("ddpo", {"by": "people", "advantage": "group"}, ["rollout.by='people'", "advantage none"]),
        ("dpo", {"frames": 17, "by": "people"}, ["rollout.by='people' with data.frames=17", "rewards"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_model_is_loaded(method, rollout, words):
    with pytest.raises(UserError) as error:
        check_online(offline_or_online(method, **rollout))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("method", "rollout"),
    [
        ("dpo", {"prompts": "", "rewards": ()}),
        ("dpo", {}),
        ("dpo", {"eta": 0.0, "shared_noise": False}),
        ("d3po", {"combine": "pareto"}),
        ("d3po", {"shape": "tree"}),
        ("spo", {"shape": "trajectories"}),
        ("ddpo", {"samples": 1, "advantage": "prompt"}),
        ("awm", {"part": 1, "advantage": "group_batch", "eta": 0.0, "shared_noise": False}),
        ("diffusion_nft", {"advantage": "best", "eta": 0.0, "shared_noise": False}),
        ("d3po", {"by": "people", "rewards": ()}),
        ("kto", {"by": "people", "rewards": ()}),
    ],
)
def test_settings_that_fit(method, rollout):
    check_online(offline_or_online(method, **rollout))


@dataclass(frozen=True)
class Sampled:
    """A model as a plan sees it."""

    path: NoisingPath

    def latent_shape(self, height, width, frames=1):
        return (4, height // 8, width // 8)

    def grid(self, steps, shape):
        return grid_of(self.path, steps)


def windows(training=None, every=16, **rollout):
    """Configure a round of 8 prompts in micro-batches of 4, at 8 steps: 16 micro-batches."""
    training = TrainingConfig(**{"batch_size": 4} | (training or {}))
    run = offline_or_online("d3po", training, every, **{"steps": 8} | rollout)
    _check_windows(run, plan_of(run, Sampled(sd_path())))


def test_a_round_is_whole_optimizer_steps():
    windows()
    windows({"accumulation": 4, "reference_every": 8}, every=4)
    windows({"reference_every": 20}, every=40, trained_steps=0.3, passes=5)  # 2 of 8 steps: 2 * 2 * 5


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        ("sd3_flow_grpo", 2),
        ("sd3_awm", 1),
        ("sd3_diffusion_nft", 1),
        ("flux_dancegrpo", 2),
        ("flux_mixgrpo", 2),
        ("wan_dancegrpo", 2),
    ],
)
def test_published_rounds_of_flow_models(name, updates):
    run = read_run(name)
    plan = plan_of(run, Sampled(RectifiedFlow()))
    _check_windows(run, plan)
    assert steps_of_a_round(run, plan) == updates


@pytest.mark.parametrize(
    ("training", "every", "rollout", "words"),
    [
        ({"accumulation": 3}, 16, {}, ["training.accumulation=3", "divisor of the 16 micro-batches"]),
        ({}, 24, {}, ["checkpoint.every=24", "multiple of the 16 optimizer steps"]),
        ({"accumulation": 4}, 6, {}, ["checkpoint.every=6", "multiple of the 4 optimizer steps"]),
        (
            {"reference_every": 8},
            16,
            {},
            ["training.reference_every=8", "allowed: 0, or a multiple of the 16"],
        ),
        ({"batch_size": 3}, 16, {}, ["prompts_per_round=8", "multiple of training.batch_size=3"]),
        ({}, 16, {"lowest_time": 0.99}, ["rollout.lowest_time=0.99", "no step is left"]),
    ],
)
def test_windows_that_cut_a_round_are_refused(training, every, rollout, words):
    with pytest.raises(UserError) as error:
        windows(training, every, **rollout)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("every", "fits"), [(1, False), (2, False), (3, True), (6, True)])
def test_a_sampler_that_trails_moves_between_rounds(every, fits):
    """Three optimizer steps a round of DiffusionNFT; whoever is only held against may move at each."""
    rollout = {"prompts_per_round": 3, "advantage": "group_std", "eta": 0.0, "shared_noise": False}
    for method in ("diffusion_nft", "awm"):
        run = offline_or_online(method, TrainingConfig(batch_size=1), every=3, **rollout)
        run = replace(run, method={"type": method, "trail": {"type": "linear", "every": every}})
        plan = plan_of(run, Sampled(RectifiedFlow()))
        if fits or method == "awm":
            _check_windows(run, plan)
        else:
            with pytest.raises(UserError, match=f"method.trail.every={every}; allowed: a multiple of the 3"):
                _check_windows(run, plan)


def test_rollouts_of_other_settings_go_but_labels_stay(tmp_path):
    """Another output or logging makes no other run; another seed, other prompts or processes do."""
    run = replace(offline_or_online("d3po"), output=str(tmp_path))
    folder, facts = tmp_path / "rollouts", [1, ["a cat", "a dog"]]
    states = folder / "round-000000" / "part-0-000000.pt"

    def left(claimed, fresh=True):
        """Whether the states of the run are there after another claim."""
        _claim(run, folder, True, facts)
        states.parent.mkdir(exist_ok=True)
        states.write_text("states")
        _claim(claimed, folder, fresh, facts)
        return states.exists()

    other = replace(run, training=TrainingConfig(seed=1))
    assert left(replace(run, output="elsewhere", logging=LoggingConfig(every=3)))
    assert not left(other) and not left(replace(run, overwrite=True))
    assert left(other, fresh=False)  # its settings have been compared with its checkpoint's
    for others in ([2, facts[1]], [1, ["a cat"]]):
        assert left(run)
        _claim(run, folder, True, others)
        assert not states.exists()
    for kept in ("round-000000", "left-round-000001-0123abcd"):
        _claim(run, folder, True, facts)
        labels = folder / kept / "labels-anna.jsonl"
        labels.parent.mkdir()
        labels.write_text("{}\n")
        with pytest.raises(UserError, match=r"holds labels.*--overwrite true.*another --output"):
            _claim(other, folder, True, facts)
        assert labels.is_file()
        _claim(replace(other, overwrite=True), folder, True, facts)
        assert not labels.exists() and (folder / "run.json").is_file()


@pytest.mark.parametrize("recipe", ["tiny_sdxl_d3po", "tiny_sdxl_online_dpo"])
def test_displacement_is_of_pairs(recipe, capsys, monkeypatch):
    monkeypatch.setattr("diffalign.models.loading.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert main(["displacement", recipe]) == 2
    assert "learns from rollouts; allowed: data.path" in capsys.readouterr().err
