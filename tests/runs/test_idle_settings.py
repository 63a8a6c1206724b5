"""Settings that nothing reads, and lengths and betas that do not fit, are told before a run begins."""

from dataclasses import replace

import pytest

from diffalign.config.files import read_yaml, shipped_configs
from diffalign.config.io import apply_overrides, from_dict
from diffalign.config.schema import DataConfig, LoraConfig, ModelConfig, Run, TrainingConfig
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.runs.align import align
from diffalign.runs.idle_settings import (
    tell_of_beta,
    tell_of_length,
    tell_of_settings,
    unread_rewards,
    without_effect,
)


def run_of(*words):
    return apply_overrides(Run(), words)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (
            ["--optimizer.cycles", "5"],
            "no effect of optimizer.cycles=5: needed is optimizer.schedule cosine_w",
        ),
        (["--optimizer.power", "3"], "no effect of optimizer.power=3.0: needed is optimizer.schedule polyn"),
        (
            ["--validation.prompts", "a cat"],
            "validation.prompts=('a cat',): needed is validation.every above 0",
        ),
        (["--rollout.rewards", "jpeg"], "no effect of rollout.rewards=('jpeg',): needed is rollout.prompts"),
        (
            ["--model.train", "full", "--model.lora.rank", "8", "--model.lora.alpha", "4"],
            "no effect of model.lora.rank=8, model.lora.alpha=4.0: needed is model.train lora",
        ),
        (["--model.text_encoder.lora.alpha", "4"], "text_encoder.lora.alpha=4.0: needed is its rank above 0"),
        (["--data.bucket_step", "32"], "no effect of data.bucket_step=32: needed is data.buckets true"),
        (["--training.reference_mix", "0.5"], "needed is training.reference_every above 0"),
    ],
)
def test_settings_that_nothing_reads_are_told(words, note):
    (told,) = without_effect(run_of(*words))
    assert note in told


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--optimizer.cycles", "5", "--optimizer.schedule", "cosine_with_restarts"],
        ["--optimizer.power", "3", "--optimizer.schedule", "polynomial"],
        ["--model.lora.rank", "8"],
        ["--model.text_encoder.lora.rank", "4", "--model.text_encoder.lora.alpha", "4"],
        ["--rollout.prompts", "tiny:train", "--rollout.rewards", "jpeg"],
    ],
)
def test_settings_that_are_read_are_not(words):
    assert list(without_effect(run_of(*words))) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method.type", "dpo"], True),
        (["--method.type", "madpo"], False),
        (["--method.type", "smpo"], False),
        (["--method.type", "semi_dpo"], True),
        (["--method.type", "semi_dpo", "--method.loss_type", "gce"], False),
        (["--method.type", "dpo", "--strategies", '[{"type": "weighted"}]'], True),
        (["--method.type", "dpo", "--strategies", '[{"type": "weighted", "source": "reward"}]'], False),
        (["--method.type", "dpo", "--data.rewards_as", "wins"], False),
        (["--method.type", "dpo", "--data.filters.agree", "1"], False),
        (["--method.type", "dpo", "--data.filters.min_margin", "0.1"], False),
        (["--method.type", "dpo", "--data.filters.nsfw", "0"], False),
        (["--method.type", "dpo", "--data.curriculum.stages", "2"], True),
        (["--method.type", "dpo", "--data.curriculum.stages", "2", "--data.curriculum.by", "reward"], False),
        (["--method.type", "sft", "--data.view", "demonstrations", "--data.best", "5"], False),
    ],
)
def test_rewards_that_nothing_reads_are_told(words, told):
    run, lines = run_of(*words, "--data.rewards", "jpeg"), []
    tell_of_settings(run, build(run.method), lines.append)
    assert [line.startswith("note: no effect of data.rewards=('jpeg',), which score") for line in lines] == [
        True
    ] * told


def told_of_length(steps, *words):
    run, lines = run_of(*words), []
    tell_of_length(run, replace(run.training, steps=steps), lines.append)
    return lines


def test_a_warm_up_longer_than_the_run():
    (line,) = told_of_length(50, "--optimizer.warmup_steps", "200")
    assert "the learning rate ends at 25% of optimizer.learning_rate" in line
    assert told_of_length(201, "--optimizer.warmup_steps", "200") == []


def test_a_moving_average_longer_than_the_run():
    (line,) = told_of_length(2000, "--training.ema_decay", "0.9999")
    assert "82% of the average" in line and "such as 0.995 follows" in line
    assert told_of_length(2000, "--training.ema_decay", "0.995") == []


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"type": "dpo", "beta": 0.1}, True),
        ({"type": "dpo", "beta": 500.0}, False),
        ({"type": "sft"}, False),
        ({"type": "diffusion_nft", "beta": 0.1}, False),
    ],
)
def test_betas_of_language_models_are_told(method, told):
    lines = []
    tell_of_beta(build(method), lines.append)
    assert [line.startswith("warning: method.beta=0.1 is far below the default") for line in lines] == [
        True
    ] * told


def test_a_beta_of_sums_is_in_another_unit():
    lines = []
    tell_of_beta(DPO(beta=0.1, reduce=lambda squared: squared.flatten(1).sum(1)), lines.append)
    assert lines == []


def test_no_shipped_recipe_has_any_of_them():
    for name, file in shipped_configs().items():
        run, lines = from_dict(read_yaml(file), name), []
        tell_of_beta(build(run.method), lines.append)
        if run.training.epochs is None:
            tell_of_length(run, run.training, lines.append)
        assert unread_rewards(run, build(run.method)) is None, name
        assert [*without_effect(run), *lines] == [], name


def test_a_run_says_them(tmp_path, capsys):
    run = Run(
        output=str(tmp_path),
        method={"type": "dpo", "beta": 0.1},
        model=ModelConfig(path="tiny:sd15", lora=LoraConfig(rank=1)),
        data=DataConfig(path="tiny:pairs", resolution=32, limit=2, holdout=0),
        training=TrainingConfig(steps=1, ema_decay=0.999),
    )
    align(apply_overrides(run, ["--optimizer.cycles", "5"]))
    told = capsys.readouterr().err
    for words in (
        "note: no effect of optimizer.cycles=5",
        "method.beta=0.1 is far",
        "training.ema_decay=0.999 in",
    ):
        assert told.count(words) == 1
