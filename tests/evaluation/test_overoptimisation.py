"""The over-optimisation alarm: conditions under which it triggers, and the hook on the tiny SDXL."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from diffalign.config.schema import (
    DataConfig,
    ModelConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from diffalign.errors import UserError
from diffalign.evaluation.measuring.measuring import measure
from diffalign.evaluation.measuring.statistics import bootstrap_mean
from diffalign.evaluation.overoptimisation import Scores, begin, from_json, scores_of
from diffalign.models.loading import load as load_model
from diffalign.rewards import load
from diffalign.runs.align import align
from diffalign.runs.validate import read_run
from diffalign.runs.validation import ValidationHook
from diffalign.tiny.scenes import render, scene_of, split_captions
from diffalign.tiny.sets import misdraw
from diffalign.training.acceleration import accelerator_for
from diffalign.training.hooks import Hook

N = 12
PROMPTS = tuple(f"prompt {i}" for i in range(N))
PLAIN = {"saturation": 0.4, "edge_density": 0.2, "dark_fraction": 0.2}


def scores(trained=0.0, other=0.0, spread=0.05, statistics=PLAIN, diversity=0.3, prompts=PROMPTS):
    """Scores around given means; the same noise in each call, but for a spread of its own."""
    draw = np.random.default_rng(0)
    rewards = {name: tuple(draw.normal(0, 1, len(prompts))) for name in ("trained", "other")}
    own = np.random.default_rng(1).normal(0, spread, len(prompts))
    shift = {"trained": trained, "other": other}
    return Scores(
        tuple(prompts),
        {name: tuple(np.add(rewards[name], shift[name]) + own * bool(shift[name])) for name in rewards},
        {name: (value,) * len(prompts) for name, value in statistics.items()},
        dict.fromkeys(prompts, diversity),
    )


def alarms(now, base=None):
    history = begin(0, base or scores(), ["trained"]).after(100, now)
    return {alarm.about: alarm.text for alarm in history.entries[-1].alarms}


def test_reward_up_and_another_down_is_an_alarm():
    told = alarms(scores(trained=0.5, other=-0.3))
    assert list(told) == ["other"]
    assert told["other"].startswith("step 100: trained rose from ")
    for words in ("but other fell from", "lower optimizer.learning_rate", "kl", "stop before step 100"):
        assert words in told["other"]


def test_figures_in_the_sentence_are_those_of_the_paired_bootstrap():
    base, now = scores(), scores(trained=0.5, other=-0.3)
    gain = bootstrap_mean(np.subtract(now.rewards["other"], base.rewards["other"]))
    said = f"({gain.value:+.3g}, 95 % interval {gain.low:+.3g} to {gain.high:+.3g})"
    assert said in alarms(now)["other"]
    assert (
        f"from {np.mean(base.rewards['other']):.4g} to {np.mean(now.rewards['other']):.4g}"
        in (alarms(now)["other"])
    )


@pytest.mark.parametrize(
    "now",
    [
        scores(trained=0.5, other=0.3),  # both up
        scores(trained=-0.5, other=-0.3),  # both down: no gain, so not over-optimised
        scores(trained=0.5),  # the other stays
        scores(trained=0.02, other=-0.3, spread=1.0),  # the rise may be none
        scores(trained=0.5, other=-0.02, spread=1.0),  # the fall may be none
        scores(trained=0.5, statistics={**PLAIN, "dark_fraction": 0.22}),  # a trifle
    ],
)
def test_no_alarm(now):
    assert alarms(now) == {}


def test_fewer_than_six_prompts_show_nothing():
    few = PROMPTS[:5]
    now = scores(trained=0.5, other=-0.3, prompts=few)
    assert alarms(now, scores(prompts=few)) == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("saturation", 0.95, "the colour saturation rose from 0.4 to 0.95"),
        ("edge_density", 0.08, "the edge density fell from 0.2 to 0.08"),
        ("dark_fraction", 0.93, "the share of dark pixels rose from 0.2 to 0.93"),
    ],
)
def test_pictures_that_go_wrong_are_named(name, value, words):
    told = alarms(scores(trained=0.5, other=0.3, statistics={**PLAIN, name: value}))
    assert list(told) == [name] and words in told[name]


def test_images_of_a_prompt_that_all_look_the_same_are_named():
    assert list(alarms(scores(trained=0.5, diversity=0.05))) == ["diversity"]


def test_what_is_logged():
    history = begin(0, scores(), ["trained"]).after(100, scores(trained=0.5, other=-0.3))
    scalars = history.entries[-1].scalars
    assert scalars["validation/other"] == pytest.approx(np.mean(scores(other=-0.3).rewards["other"]))
    assert scalars["validation/saturation"] == pytest.approx(0.4)
    assert scalars["validation/diversity"] == pytest.approx(0.3)
    assert scalars["validation/alarm"] == 1.0
    first = history.entries[0]
    assert first.scalars["validation/alarm"] == 0.0
    assert all(r.gain.interval == [0, 0] and r.base == r.now for r in first.rewards)


def test_an_alarm_is_new_once_and_says_where_to_stop():
    bad = scores(trained=0.5, other=-0.3)
    history = begin(0, scores(), ["trained"]).after(100, scores(trained=0.2, other=0.1)).after(200, bad)
    assert [alarm.about for alarm in history.new_alarms] == ["other"]
    assert "stop at step 100, the last evaluation without an alarm" in history.new_alarms[0].text
    again = history.after(300, bad)
    assert again.entries[-1].alarms and again.new_alarms == ()
    both = again.after(400, replace(bad, statistics=dict.fromkeys(PLAIN, (0.95,) * N)))
    assert {alarm.about for alarm in both.new_alarms} == {"saturation", "dark_fraction"}


def test_a_history_survives_json_and_loses_its_end():
    history = begin(0, scores(), ["trained"]).after(100, scores(0.5, -0.3)).after(200, scores(0.5))
    back = from_json(json.loads(json.dumps(history.to_json())))
    assert back == history and [e.step for e in back.until(199).entries] == [0, 100]
    assert back.until(100).after(200, scores(0.5)) == history


def test_other_prompts_or_rewards_are_not_compared():
    with pytest.raises(ValueError, match="the same prompts and rewards"):
        begin(0, scores(), []).after(1, scores(prompts=PROMPTS[::-1]))


def test_vivid_pictures_of_other_things_please_the_taste_alone():
    """A reward for how vivid a scene is, and images whose words went wrong while they became vivid."""
    prompts, rewards = split_captions("test")[:N], {name: load(name) for name in ("taste", "judge")}
    rng = np.random.default_rng(0)
    scenes = [scene_of(prompt, rng, vivid=False) for prompt in prompts]
    honest = [replace(scene, vivid=True) for scene in scenes]
    hacked = [replace(misdraw(scene, 2, rng), vivid=True) for scene in scenes]

    def measured(those):
        with tqdm(disable=True) as bar:
            images = [render(scene) for scene in those]
            return scores_of(measure(images, prompts, rewards, bar), prompts, tuple(rewards))

    history = begin(0, measured(scenes), ["taste"])
    assert "judge" not in {alarm.about for alarm in history.after(1, measured(honest)).entries[1].alarms}
    told = {alarm.about: alarm.text for alarm in history.after(1, measured(hacked)).entries[1].alarms}
    assert "judge" in told and "taste rose" in told["judge"] and "judge fell from 1 to" in told["judge"]


def test_of_a_reward_with_a_weight_below_0_less_is_better():
    """The same figures with the sign of one reward turned round."""
    base = begin(0, scores(), ["trained"], lower=["trained"])
    assert base.after(1, scores(trained=0.5, other=-0.3)).entries[1].alarms == ()
    (alarm,) = base.after(1, scores(trained=-0.5, other=-0.3)).entries[1].alarms
    assert alarm.about == "other" and "trained fell from" in alarm.text
    base = begin(0, scores(), ["trained"], lower=["other"])
    assert base.after(1, scores(trained=0.5, other=-0.3)).entries[1].alarms == ()
    (alarm,) = base.after(1, scores(trained=0.5, other=0.3)).entries[1].alarms
    assert alarm.about == "other" and "but other rose from" in alarm.text


@dataclass
class State:
    """What the hook sees of a run."""

    model: Any
    step: int = 0
    logged: dict[str, float] = field(default_factory=dict)
    media: list[dict[str, Any]] = field(default_factory=list)
    accelerator: Any = field(default_factory=lambda: accelerator_for(TrainingConfig()))

    def evaluating(self, averaged=True):
        return torch.no_grad()

    def log(self, values):
        self.logged |= values

    def log_media(self, files):
        self.media.append(files)


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(path="tiny:sdxl"))


def a_run(folder, prompts=4, every=5, rewards=("judge",), online=True):
    texts = tuple(split_captions("validation")[:prompts])
    return Run(
        output=str(folder),
        data=DataConfig(resolution=32),
        rollout=RolloutConfig(prompts="tiny:train" if online else "", rewards=("0.5*taste",)),
        validation=ValidationConfig(
            every=every, prompts=texts, sampling_steps=2, guidance=1.0, rewards=rewards, images_per_prompt=2
        ),
    )


def nudge(model, scale):
    with torch.no_grad():
        model.pipeline.unet.conv_out.weight.mul_(scale)


def test_the_hook_on_the_tiny_sdxl(model, tmp_path):
    run, said, state = a_run(tmp_path), [], State(model)
    watch = ValidationHook(run, model, run.rollout.rewards, said.append)
    watch.on_start(state)
    assert state.logged == {} and said == [
        "validation.prompts has 4 prompts: over-optimisation cannot be shown on fewer than 6, so there will "
        "be no alarm"
    ]
    nudge(model, 1.1)
    try:
        for state.step in (4, 5, 10):
            watch.on_step(state)
    finally:
        nudge(model, 1 / 1.1)
    folders = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert folders == ["step-000000", "step-000005", "step-000010"]
    assert all(len(list((tmp_path / "samples" / f).glob("*.png"))) == 8 for f in folders)
    names = {
        folder: sorted(p.name for p in (tmp_path / "samples" / folder).glob("*.png")) for folder in folders
    }
    assert len(set(map(tuple, names.values()))) == 1 and names["step-000005"][:2] == [
        "0000-0.png",
        "0000-1.png",
    ]
    shown = [list(files) for files in state.media]
    assert len(shown) == 3 and shown[0] == shown[1] == shown[2] and len(shown[0]) == 8
    assert shown[0][0] == f"validation/000-0 {run.validation.prompts[0][:60]}"
    assert all(file.parent.name == "step-000010" and file.is_file() for file in state.media[-1].values())
    written = json.loads((tmp_path / "validation.json").read_text())["history"]
    assert [entry["step"] for entry in written["entries"]] == [0, 5, 10]
    assert written["trained"] == ["taste"]
    assert [r["name"] for r in written["entries"][1]["rewards"]] == ["taste", "judge"]
    assert state.logged["validation/taste"] == written["entries"][2]["rewards"][0]["now"]
    assert {"validation/judge", "validation/alarm", "validation/diversity"} <= state.logged.keys()
    # the same weights and noise: the same figures
    assert written["entries"][1]["rewards"] == written["entries"][2]["rewards"]

    resumed, again = State(model, step=5), ValidationHook(run, model, run.rollout.rewards, said.append)
    again.on_start(resumed)
    assert [entry.step for entry in again.history.entries] == [0, 5]
    assert again.history == watch.history.until(5)
    once_more = ValidationHook(
        replace(run, validation=replace(run.validation, seed=1)), model, ["taste"], said.append
    )
    once_more.on_start(resumed)
    assert [entry.step for entry in once_more.history.entries] == [5]
    assert "evaluations are compared with the model of step 5" in said[-1]


def test_two_runs_of_the_hook_write_the_same(model, tmp_path):
    written = []
    for name in ("one", "other"):
        run, state = a_run(tmp_path / name), State(model)
        watch = ValidationHook(run, model, run.rollout.rewards, lambda line: None)
        watch.on_start(state)
        state.step = 5
        watch.on_step(state)
        written.append((tmp_path / name / "validation.json").read_bytes())
    assert written[0] == written[1]


def test_each_alarm_is_said_once(model, tmp_path):
    """Rewards of two kinds that go apart as the run goes on."""
    state, said = State(model), []

    def make(spec, device):
        sign = 1.0 if spec == "taste" else -1.0
        return lambda images, prompts: torch.full((len(prompts),), sign * state.step)

    watch = ValidationHook(a_run(tmp_path, prompts=6), model, ["taste"], said.append, make)
    watch.on_start(state)
    for state.step in (5, 10):
        watch.on_step(state)
    assert state.logged["validation/alarm"] == 1.0 and len(said) == 1
    assert said[0].startswith("alarm: step 5: taste rose from 0 to 5 (+5, 95 % interval +5 to +5), but judge")
    resumed = ValidationHook(a_run(tmp_path, prompts=6), model, ["taste"], said.append, make)
    resumed.on_start(state)
    state.step = 15
    resumed.on_step(state)
    assert len(said) == 1 and len(resumed.history.entries[-1].alarms) == 1


def test_an_offline_run_without_rewards_only_draws(model, tmp_path):
    run, state = a_run(tmp_path, rewards=(), online=False), State(model)
    watch = ValidationHook(run, model)
    assert isinstance(watch, Hook)
    watch.on_start(state)
    assert not list(tmp_path.iterdir())
    state.step = 5
    watch.on_step(state)
    watch.on_end(state)
    assert [p.name for p in tmp_path.iterdir()] == ["samples"] and state.logged == {}
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-000005"]
    assert [Image.open(p).size for p in (tmp_path / "samples").glob("*/*.png")] == [(32, 32)] * 8


def test_what_is_trained_on_is_no_second_opinion(model, tmp_path):
    for specs, message in (
        (("taste",), "validation.rewards has 'taste', which is trained on and"),
        (("judge", "2*judge"), "validation.rewards has 'judge', which is there twice"),
        (("judg",), "unknown reward 'judg'; did you mean judge"),
    ):
        with pytest.raises(UserError, match=message):
            ValidationHook(a_run(tmp_path, rewards=specs), model, ["0.5*taste"])


def test_a_history_that_cannot_be_read_is_named(model, tmp_path):
    (tmp_path / "validation.json").write_text('{"settings": {}}')
    with pytest.raises(UserError, match=r"validation.json cannot be read \(KeyError\('history'\)\)"):
        ValidationHook(a_run(tmp_path, prompts=6), model, ["taste"]).on_start(State(model, step=5))


@pytest.mark.parametrize("recipe", ["tiny_sdxl_dpo", "tiny_sd15_dpo"])
def test_validation_draws_where_weights_are_half_precision(recipe, tmp_path):
    """The trained network then answers in float32, and a VAE of half precision takes no such latents."""
    run = read_run(recipe)
    done = align(
        replace(
            run,
            output=str(tmp_path / "run"),
            model=replace(run.model, dtype="bfloat16"),
            data=replace(run.data, limit=16),
            training=replace(run.training, steps=1, batch_size=2, mixed_precision="bf16"),
            logging=replace(run.logging, trackers=()),
            validation=replace(run.validation, every=1, prompts=("a large red circle",), sampling_steps=2),
        ),
        lambda line: None,
    )
    assert len(list((done.output / "samples" / "step-000001").glob("*.png"))) == 1
