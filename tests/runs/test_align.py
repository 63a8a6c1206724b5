"""Whole runs on the tiny models: what they leave, that they resume exactly, that diffusers loads it."""

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.config.schema import ModelConfig, Run, TrainingConfig
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.export.aligned import load_aligned
from diffalign.methods import build
from diffalign.models import loading
from diffalign.runs.align import _own_trajectories, align
from diffalign.runs.resume import portable, resolved
from diffalign.runs.validate import read_run
from diffalign.training import loop
from diffalign.training.diagnostics import HeldOut
from tests.helpers import PUBLISHED_DATA

PICKAPIC = PUBLISHED_DATA / "pairs" / "pickapic.parquet"


def silent(line):
    pass


def small(output, recipe="tiny_sdxl_dpo", steps=4, **changes):
    run = read_run(recipe)
    return replace(
        run,
        output=str(output),
        data=replace(run.data, limit=40, holdout=0.1, cache_batch_size=16),
        training=replace(run.training, steps=steps, batch_size=4),
        logging=replace(run.logging, every=1, diagnostics_bins=2),
        checkpoint=replace(run.checkpoint, every=2, limit=5),
        **changes,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run = small(tmp_path_factory.mktemp("runs") / "one")
    run = replace(
        run, validation=replace(run.validation, every=2, prompts=("a small red circle",), sampling_steps=2)
    )
    return run, align(run, silent)


def test_a_run_directory_holds_what_it_should(done):
    run, result = done
    assert (result.steps, result.interrupted) == (4, False)
    assert read_run(result.output / "config.yaml") == portable(resolved(run, build(run.method)))
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["rewards/margins"] == 0.0
    assert steps[0]["rewards/accuracies"] == 0.5
    held_out = [row for row in rows if "heldout/rewards/accuracies" in row]
    assert len(held_out) == 1 and "heldout/0-0.5/errors/chosen" in held_out[0]
    assert len(list((result.output / "samples").glob("step-*/*.png"))) == 2
    assert list((result.output / "tensorboard").iterdir())
    card = (result.output / "aligned" / "README.md").read_text()
    assert "Diffusion-DPO" in card and "load_lora_weights" in card and "beta: 1000" in card


@pytest.mark.parametrize(
    ("train", "every", "kept"), [("lora", 0, False), ("lora", 2, True), ("full", 0, True)]
)
def test_encoders_are_freed_where_nothing_asks_for_them_again(train, every, kept, tmp_path, monkeypatch):
    """Validation samples with them, and a run of all weights saves them."""
    held, load, trained = [], loading.load, loop.train

    def loaded(*arguments, **named):
        model = load(*arguments, **named)
        held.extend(
            weakref.ref(next(getattr(model.pipeline, name).parameters()))
            for name in ("vae", "text_encoder", "text_encoder_2")
        )
        return model

    def training(**named):
        gc.collect()
        assert [ref() is not None for ref in held] == [kept] * 3
        return trained(**named)

    monkeypatch.setattr("diffalign.runs.align.load", loaded)
    monkeypatch.setattr("diffalign.runs.align.train", training)
    run = small(tmp_path / "run", steps=2)
    watched = replace(run.validation, every=every, prompts=("a small red circle",), sampling_steps=1)
    result = align(replace(run, model=replace(run.model, train=train), validation=watched), silent)
    names = {p.name for p in result.aligned.iterdir()}
    assert ("text_encoder" in names) == (train == "full") and "README.md" in names


def test_validation_changes_no_number_of_the_training(done, tmp_path):
    run, result = done
    quiet = replace(run, output=str(tmp_path / "quiet"), validation=replace(run.validation, every=0))
    align(quiet, silent)
    for name in ("trainable.safetensors",):
        one, other = (r / "checkpoints" / "step-4" / name for r in (result.output, tmp_path / "quiet"))
        assert one.read_bytes() == other.read_bytes()


def test_two_and_two_steps_are_four_bit_for_bit(done, tmp_path, monkeypatch):
    run, result = done
    run = replace(run, output=str(tmp_path / "halved"), validation=replace(run.validation, every=0))
    align(replace(run, training=replace(run.training, steps=2)), silent)
    resumed = align(replace(run, resume="latest"), silent)
    assert resumed.steps == 4
    one, other = (r / "checkpoints" / "step-4" for r in (result.output, resumed.output))
    assert (one / "trainable.safetensors").read_bytes() == (other / "trainable.safetensors").read_bytes()
    optimizers = [torch.load(r / "optimizer.pt", weights_only=True)["state"] for r in (one, other)]
    for a, b in zip(*(o.values() for o in optimizers), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_run_is_not_written_over(done):
    run, _ = done
    with pytest.raises(UserError, match=r"step-4.*--resume latest.*--overwrite true"):
        align(run, silent)


def test_resume_with_another_configuration_is_refused(done):
    run, _ = done
    other = replace(run, resume="latest", optimizer=replace(run.optimizer, learning_rate=1.0))
    with pytest.raises(UserError, match=r"optimizer.learning_rate is 0.0005 in the checkpoint and 1.0 now"):
        align(other, silent)


ISOLATED = """
import sys
sys.modules["diffalign"] = None  # whoever imports it gets a ModuleNotFoundError
import numpy, torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
pipeline.load_lora_weights(sys.argv[2])
pipeline.set_progress_bar_config(disable=True)
generator = [torch.Generator().manual_seed(int(sys.argv[4]))]
image = pipeline(["a small red circle"], num_inference_steps=3, generator=generator)
numpy.save(sys.argv[3], numpy.asarray(image.images[0]))
"""


def test_plain_diffusers_draws_the_same_image(done, tmp_path):
    """In a process where diffalign cannot be imported."""
    run, result = done
    from diffalign.tiny import pipeline_path

    sampled = generate(
        load_aligned(run.model, result.aligned), ["a small red circle"], SamplingSettings(3), progress=False
    )[0]
    path = str(tmp_path / "image.npy")
    arguments = [str(pipeline_path("sdxl")), str(result.aligned), path, str(sampled.seed)]
    subprocess.run([sys.executable, "-I", "-c", ISOLATED, *arguments], check=True, cwd=tmp_path, timeout=300)
    np.testing.assert_array_equal(np.load(path), np.asarray(sampled.image))


@pytest.mark.parametrize("recipe", ["tiny_sd15_dpo", "tiny_sdxl_sft", "tiny_sdxl_ipo"])
def test_the_other_recipes_run(recipe, tmp_path):
    result = align(small(tmp_path / "run", recipe, steps=2), silent)
    assert result.steps == 2 and (result.aligned / "pytorch_lora_weights.safetensors").is_file()


def test_full_fine_tuning_with_a_moving_average(tmp_path):
    run = small(tmp_path / "run", steps=2)
    run = replace(run, model=replace(run.model, train="full"), training=replace(run.training, ema_decay=0.5))
    run = replace(run, optimizer=replace(run.optimizer, learning_rate=1e-5))
    result = align(run, silent)
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/margins"] == 0.0 and rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    from safetensors.torch import load_file

    ema = load_file(result.output / "checkpoints" / "step-2" / "ema.safetensors")
    saved = dict(load_aligned(run.model, result.aligned).unet.named_parameters())
    assert all(torch.equal(saved[name], value) for name, value in ema.items())


def test_real_images_in_pick_a_pics_schema(tmp_path):
    run = small(tmp_path / "run", steps=2)
    said = []
    align(replace(run, data=replace(run.data, path=str(PICKAPIC))), said.append)
    assert any("7 pairs, 1 tie, 1 row without label, 0 unreadable" in line for line in said)


def test_data_errors_come_before_the_model_is_loaded(tmp_path, monkeypatch):
    run = small(tmp_path / "run")
    monkeypatch.setattr("diffalign.runs.align.load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"nowhere.parquet"):
        align(replace(run, data=replace(run.data, path=str(tmp_path / "nowhere.parquet"))), silent)


def test_held_out_groups_are_never_trained_on(done):
    """Diagnostics' and source's groups are disjoint by prompt (data tests), and both are there."""
    _, result = done
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary["held_out"]["rewards/accuracies"] >= 0 and "held-out" in summary["verdict"]
    assert HeldOut([]).verdict == "not measured: no held-out data"


def test_cached_inversions_belong_to_a_base_model():
    """A trajectory is known by what was inverted: who inverted it is in the folder's name."""

    def cache(path, **method):
        run = Run(model=ModelConfig(path=path), method={"type": "inversion_dpo", **method})
        return _own_trajectories(run)

    one, other = (cache(path, cache="kept")["cache"] for path in ("a", "b"))
    assert one != other and Path(one).parent == Path(other).parent == Path("kept")
    changed = {"network": "n", "adapter": ("l",), "quantize": "nf4", "prediction": "v_prediction"}
    runs = [
        Run(model=ModelConfig("a", **{k: v}), method={"type": "inversion_dpo", "cache": "kept"})
        for k, v in changed.items()
    ]
    assert len({one, *(_own_trajectories(run)["cache"] for run in runs)}) == 1 + len(changed)
    inside = cache("a", noising={"type": "inversion", "cache": "kept"})["noising"]
    assert inside == {"type": "inversion", "cache": one}
    assert cache("a", noising="inversion") == {"type": "inversion_dpo", "noising": "inversion"}
    moving = Run(
        method={"type": "inversion_dpo", "cache": "kept"}, training=TrainingConfig(reference_every=5)
    )
    with pytest.raises(UserError, match=r"cache='kept' with training.reference_every=5"):
        _own_trajectories(moving)
