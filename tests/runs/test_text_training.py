"""Runs that train LoRA of the text encoders too: start, resume, what they leave for other programs."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import ModelConfig, TextEncoderConfig, TextLoraConfig
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.export.aligned import load_aligned
from diffalign.export.job import Export, export
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.models.lora_formats import read_lora
from diffalign.runs.align import align
from diffalign.runs.role_checks import check_roles
from diffalign.runs.validate import read_run
from diffalign.strategies import wrap
from diffalign.tiny import pipeline_path
from tests.export.readers import merge_kohya
from tests.runs.test_align import ISOLATED, silent, small

PREFIXES = {"sd15": ("lora_te_",), "sdxl": ("lora_te1_", "lora_te2_")}


def with_text(run, **text):
    lora = TextLoraConfig(**{"rank": 4} | text)
    return replace(run, model=replace(run.model, text_encoder=TextEncoderConfig(lora)))


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def done(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = with_text(small(folder / "one", f"tiny_{request.param}_dpo", steps=2, overwrite=False))
    run = replace(
        run,
        checkpoint=replace(run.checkpoint, every=1, limit=5),
        optimizer=replace(run.optimizer, warmup_steps=0, learning_rate=5e-3),
    )
    said = []
    return request.param, run, align(run, said.append), said


def test_it_starts_at_the_reference_with_the_noise_and_order_of_a_run_without(done, tmp_path):
    _, run, result, said = done
    first = metrics(result.output)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["rewards/margins"] == 0.0
    plain = replace(
        run, output=str(tmp_path / "plain"), model=replace(run.model, text_encoder=TextEncoderConfig())
    )
    align(replace(plain, training=replace(run.training, steps=1)), silent)
    other = metrics(tmp_path / "plain")[0]
    for name in ("errors/chosen", "errors/rejected"):
        assert first[name] == pytest.approx(other[name], rel=1e-5), name
    assert any("trained with LoRA; the cache holds tokens" in line for line in said)


def test_the_adapters_move_and_the_base_does_not(done):
    _, run, result, _ = done
    first, second = (
        load_file(result.output / "checkpoints" / f"step-{n}" / "trainable.safetensors") for n in (1, 2)
    )
    text = [name for name in first if name.startswith("text_encoder")]
    assert {name.partition(".")[0] for name in text} == set(load(run.model).text_encoders)
    assert all("lora_" in name for name in text)
    assert all(not torch.equal(first[name], second[name]) for name in text)


def test_one_step_and_one_are_two_bit_for_bit(done, tmp_path):
    _, run, result, _ = done
    part = replace(run, output=str(tmp_path / "parts"))
    align(replace(part, training=replace(run.training, steps=1)), silent)
    align(replace(part, resume="latest"), silent)
    name = "checkpoints/step-2/trainable.safetensors"
    whole, parts = load_file(result.output / name), load_file(tmp_path / "parts" / name)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_plain_diffusers_draws_the_same_image(done, tmp_path):
    family, run, result, _ = done
    model = load_aligned(run.model, result.aligned)
    sampled = generate(model, ["a small red circle"], SamplingSettings(3), progress=False)[0]
    base = generate(load(run.model).pipeline, ["a small red circle"], SamplingSettings(3), progress=False)[0]
    path = str(tmp_path / "image.npy")
    code = ISOLATED.replace("StableDiffusionXLPipeline", "DiffusionPipeline")
    arguments = [str(pipeline_path(family)), str(result.aligned), path, str(sampled.seed)]
    subprocess.run([sys.executable, "-I", "-c", code, *arguments], check=True, cwd=tmp_path, timeout=300)
    np.testing.assert_array_equal(np.load(path), np.asarray(sampled.image))
    assert not np.array_equal(np.asarray(base.image), np.asarray(sampled.image))


def test_a_checkpoint_and_its_adapter_are_the_same_model(done):
    """``model.path`` as a checkpoint folds text adapters too."""
    _, run, result, _ = done
    from_run = load(ModelConfig(path=str(result.output)))
    from_step = load(ModelConfig(path=str(result.output / "checkpoints" / "step-2")))
    plain = load(run.model)
    for name in plain.text_encoders:
        one, two, base = (getattr(m.pipeline, name).state_dict() for m in (from_run, from_step, plain))
        assert one.keys() == two.keys() == base.keys()
        assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-6) for k in one)
        assert any(not torch.equal(one[k], base[k]) for k in one)


def test_the_kohya_file_holds_them_and_is_read_back_equal(done, tmp_path):
    family, run, result, _ = done
    path = export(run.model, result.aligned, Export("kohya", tmp_path / "x.safetensors"), say=silent)
    state = load_file(path)
    for prefix in PREFIXES[family]:
        assert any(key.startswith(prefix) and key.endswith(".alpha") for key in state), prefix
    model = load(run.model)
    ours, again = read_lora(result.aligned, model)[0], read_lora(path, model)[0]
    assert set(ours) == set(again) == {"unet", *model.text_encoders}
    for component, modules in ours.items():
        assert modules.keys() == again[component].keys()
        assert all(torch.equal(again[component][m].product(), f.product()) for m, f in modules.items())
    aligned, merged = load_aligned(run.model, result.aligned), load(run.model)
    merge_kohya(state, merged.pipeline)
    prompts = ["a small red circle"]
    found, expected = (
        merged.family.encode_prompts(pipeline, prompts) for pipeline in (merged.pipeline, aligned)
    )
    assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)


def test_a_frozen_encoder_stays_cached(tmp_path):
    run = with_text(small(tmp_path / "one", steps=1), encoders=("text_encoder",))
    result = align(run, silent)
    names = load_file(result.output / "checkpoints" / "step-1" / "trainable.safetensors")
    assert {name.partition(".")[0] for name in names if name.startswith("text_encoder")} == {"text_encoder"}
    assert metrics(result.output)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("tiny_sdxl_dpo", {"strategies": ({"type": "fast_slow"},)}, "the strategy fast_slow; allowed: 0"),
        ("tiny_sd3_diffusion_nft", {}, "which a moving average follows; allowed: 0"),
    ],
)
def test_roles_that_cannot_share_the_encoders_are_refused(recipe, changes, words):
    run = with_text(replace(read_run(recipe), **changes))
    with pytest.raises(UserError, match=words):
        check_roles(run, wrap(build(run.method), run.strategies))


def test_full_training_and_a_reference_that_follows_are_refused():
    run = with_text(read_run("tiny_sdxl_dpo"))
    method = wrap(build(run.method), run.strategies)
    with pytest.raises(UserError, match=r"model\.train='full' with model\.text_encoder\.lora\.rank=4"):
        check_roles(replace(run, model=replace(run.model, train="full")), method)
    following = replace(run, training=replace(run.training, reference_every=2))
    with pytest.raises(UserError, match=r"training\.reference_every=2 with model\.text_encoder"):
        check_roles(following, method)
    online = replace(run, rollout=replace(run.rollout, prompts="tiny:prompts"))
    with pytest.raises(UserError, match=r"rollout\.prompts='tiny:prompts' with model\.text_encoder"):
        check_roles(online, method)
