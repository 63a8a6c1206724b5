"""The sweeps of the tiny SDXL: every arm is a valid run, and its gain is over the base sampled alike."""

import pytest
from diffusers import DPMSolverMultistepScheduler

from benchmarks import record, sweeps, tiny_world
from benchmarks.sweeps import ARMS, DRAWINGS, TABLES, Arm
from diffalign.config.schema import ModelConfig
from diffalign.methods import build
from diffalign.models.loading import load


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_changes_what_it_says(arm: Arm) -> None:
    run = tiny_world.recipe(arm.recipe, arm.flags)
    shipped = tiny_world.recipe(arm.recipe)
    share = 0.2 if "20-wrong" in arm.name else 0.4 if "40-wrong" in arm.name else 0.0
    assert run.data.flip_labels == share
    assert ("pairs" in arm.name) == (run.data.limit != shipped.data.limit)
    if "robust" in arm.name:
        assert build(run.method).loss.label_noise == share
    assert build(run.method).time == build(shipped.method).time


def test_tables_name_arms() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {name for listed in TABLES.values() for name in listed} <= set(names)


def test_the_scheduler_of_a_drawing_is_used_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(ModelConfig("tiny:sdxl")).pipeline
    kept, used = pipeline.scheduler, []

    def scores(pipeline, split, prompts, settings):
        used.append((type(pipeline.scheduler), settings.guidance_scale, settings.num_inference_steps))
        return {}

    monkeypatch.setattr(tiny_world, "scores", scores)
    sweeps.scores_of(pipeline, ["same", "guidance-4", "dpm", "steps-8"], 4)
    assert pipeline.scheduler is kept
    same = type(kept)
    assert used == [
        (same, 1.0, 20),
        (same, 4.0, 20),
        (DPMSolverMultistepScheduler, 1.0, 20),
        (same, 1.0, 8),
    ]


def test_the_page_has_the_gain_over_the_base_sampled_alike(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setattr(record, "WORK", tmp_path / "work")
    rewards = lambda value: {name: [value, value + 0.5] for name in sweeps.REWARDS}  # noqa: E731
    levels = {name: i / 10 for i, name in enumerate(DRAWINGS)}
    record.keep(
        "sweep-base",
        {"prompts": 2, "drawings": DRAWINGS},
        {"scores": {name: rewards(level) for name, level in levels.items()}},
    )
    scores = {name: rewards(2 * level + 0.25) for name, level in levels.items()}
    for seed in range(2):
        record.keep(f"sweep-sft-{seed}", {}, {"arm": "sft", "seed": seed, "scores": scores})
    for pairs in (64, 1024):
        fewer = {"arm": f"dpo-{pairs}-pairs", "seed": 0, "scores": {"same": rewards(-0.125)}}
        record.keep(f"sweep-dpo-{pairs}-pairs-0", {}, fewer)
    said = sweeps.text(2)
    assert "| sampled with | base | SFT on the winners: gain (2 seeds) |" in said
    assert "Not measured yet: dpo, dpo-256-pairs" in said and "## Wrong labels" not in said
    assert "| guidance 4 | 0.450 | +0.450 [+0.450, +0.450] |" in said
    assert "| Diffusion-DPO, 64 pairs | -0.125 [-0.125, -0.125] |" in said
    assert "Euler ancestral, 20 steps | 0.950 | +0.950" in said


@pytest.mark.slow
def test_an_arm_is_trained_and_measured(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setattr(record, "WORK", tmp_path / "work")
    drawings = {name: DRAWINGS[name] for name in ("same", "guidance-2")}
    monkeypatch.setattr(sweeps, "DRAWINGS", drawings)
    arm = Arm("short", "a step", "dpo", ("--training.steps=1", "--data.limit=64"), ("guidance-2",))
    row = sweeps.make(arm, 0, 4)
    assert row is not None and [len(v) for v in row["scores"]["guidance-2"].values()] == [4, 4, 4]
    assert len(sweeps.gained(row, sweeps.base(4), "guidance-2")) == 4
    assert not list((tmp_path / "work" / "work").iterdir())
    assert sweeps.make(arm, 0, 4) == row
