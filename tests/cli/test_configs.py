"""Every recipe loads, has a header, and builds its method, and its network at real size."""

import math
import re
from dataclasses import replace

import pytest

from diffalign.config.files import shipped_configs
from diffalign.config.io import to_yaml
from diffalign.diffusion.times import LogitNormal
from diffalign.estimate.counting import meta_network
from diffalign.estimate.estimate import estimate
from diffalign.estimate.shapes import shapes_of
from diffalign.methods import build
from diffalign.runs.align import align
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.online_checks import check_online
from diffalign.runs.role_checks import check_roles
from diffalign.runs.scores import check_online_scores
from diffalign.runs.validate import read_run, validate
from diffalign.strategies import wrap
from diffalign.utils.text import read_json_lines

RECIPES = sorted(shipped_configs())


@pytest.fixture(scope="module")
def runs():
    return {name: read_run(name, needs=("model.path", "data.path")) for name in RECIPES}


def test_there_are_recipes_for_what_is_promised():
    promised = {
        "sd15_dpo", "sdxl_dpo", "sd15_dpo_lora", "sdxl_dpo_lora", "sdxl_dpo_lora_12gb", "sdxl_dpo_lora_24gb",
        "sdxl_dpo_lora_80gb", "sd15_dpo_lora_12gb", "tiny_sdxl_dpo", "tiny_sd15_dpo", "tiny_sdxl_sft",
        "tiny_sdxl_ipo",
    }  # fmt: skip
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_method_builds(name, runs, tmp_path):
    run = runs[name]
    assert run.output == f"runs/{name}"
    build(run.method)
    (tmp_path / "again.yaml").write_text(to_yaml(run))
    assert read_run(tmp_path / "again.yaml") == run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_source_hardware_and_command(name):
    text = shipped_configs()[name].read_text()
    header = text[: text.index("\n", text.rindex("#"))]
    for word in ("Source:", "GPUs", "ime:" if "GPUs and time" not in header else "time", f"train {name}"):
        assert word in header, (name, word)
    assert not re.search(r"(/home|/work|/tmp)/", text)


@pytest.mark.parametrize(
    ("name", "pairs", "rate"),
    [
        ("sd15_dpo", 2048, 2.048e-5),
        ("sdxl_dpo", 2048, 2.048e-5),
        ("sd15_dpo_lora", 32, 1e-5),
        ("sdxl_dpo_lora", 16, 1e-5),
        ("pixart_dpo", 256, 2.56e-6),
    ],
)
def test_published_batches_and_learning_rates(name, pairs, rate, runs):
    run = runs[name]
    processes = 16 if run.optimizer.scale_lr else 1
    batch = processes * run.training.batch_size * run.training.accumulation
    assert batch == pairs
    assert run.optimizer.learning_rate * (batch if run.optimizer.scale_lr else 1) == pytest.approx(rate)
    assert run.method["beta"] == 5000


def test_sd3_is_trained_as_flow_grpo_trains_its_baseline(runs):
    run = runs["sd3_dpo"]
    assert (run.method["beta"], run.optimizer.learning_rate, run.training.accumulation) == (100, 3e-4, 39)
    assert (run.model.lora.rank, run.model.lora.alpha) == (32, 64)
    assert run.training.ema_decay**8 == pytest.approx(0.9, abs=1e-3)
    time = build(run.method).time
    assert isinstance(time, LogitNormal) and (time.shift, time.steps) == (3.0, 1000)
    network, _ = meta_network(run.model, shapes_of(run.model))
    adapted = {n.split(".lora_")[0] for n, p in network.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in adapted} == {"attn"}  # not attn2, the second attention of 3.5
    # of 24 blocks: 4 of the image's in each, 3 of the text's and its output in all but the last
    assert len(adapted) == 24 * 4 + 24 * 3 + 23


def test_videos_are_trained_as_published(runs):
    """JavisDiT++ on Wan, VideoAlign's table 10 on LTX, VideoDPO on the others."""
    wan, ltx = runs["wan_dpo_lora"], runs["ltx_dpo_lora"]
    assert (wan.method["beta"], wan.optimizer.learning_rate, wan.training.accumulation) == (
        3000,
        1e-5,
        48 / 8,
    )
    time = build(wan.method).time
    assert isinstance(time, LogitNormal) and (time.shift, time.steps) == (5.0, None)
    assert wan.strategies == ({"type": "sft", "weight": 0.1},)
    assert (ltx.method["beta"], ltx.optimizer.learning_rate, ltx.training.accumulation) == (500, 5e-6, 64 / 8)
    assert (ltx.model.lora.rank, ltx.model.lora.alpha) == (64, 128)
    assert build(ltx.method).time.steps is None  # continuous
    dense = runs["wan_densedpo"]  # stopped early in the paper, so somebody has to look
    assert dense.validation.every == dense.checkpoint.every == 100 and dense.validation.prompts
    for name in ("cogvideox_dpo_lora", "modelscope_dpo_lora", "animatediff_dpo_lora"):
        assert runs[name].method == {"type": "dpo", "beta": 5000}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_every_check_that_comes_before_the_model(name, runs):
    """Method, strategies, roles, rollout and rewards together; the prompts are the embedded ones."""
    run = runs[name]
    inner = build(run.method)
    check_roles(run, wrap(inner, run.strategies))
    if run.rollout.prompts:
        run = replace(run, rollout=replace(run.rollout, prompts="tiny:train"))
        assert check_online(run)
        check_online_scores(inner, run.rollout)
    validate(run)


def test_recipes_are_as_released(runs):
    """Each value is the released code's, as the header of the recipe names it."""
    for name in ("sd3_flow_grpo", "sd3_dpo", "sd3_awm", "sd3_diffusion_nft"):
        run = runs[name]
        assert (run.model.max_sequence_length, run.model.dtype) == (128, "float16"), name
        assert run.training.mixed_precision == "fp16" and "128 tokens" in header(name), name
    for name in ("sdxl_mapo", "sdxl_rankdpo", "sd15_kto", "sdxl_inversion_dpo"):
        assert runs[name].data.prompt_dropout == 0, name
    mapo = runs["sdxl_mapo"]
    assert (mapo.optimizer.type, mapo.training.mixed_precision) == ("adamw8bit", "fp16")
    assert len(runs["flux_dpo_lora"].model.lora.targets) == 8
    assert "none known" not in header("flux_dpo_lora")
    for name in ("sd15_dpo", "sdxl_mapo", "sd15_kto", "sd15_dpo_lora", "sdxl_dpo_lora", "sd3_dpo"):
        assert "held out" in header(name), name


def header(name):
    text = shipped_configs()[name].read_text()
    return re.sub(r"\s*\n#\s*", " ", text[: text.rindex("\n#")])


TINY = {
    "sd15_kto": "tiny:pairs", "sdxl_mapo": "tiny:pairs", "sdxl_rankdpo": "tiny:lists",
    "sd15_dro": "tiny:experts",
    "sd15_tdpo": "tiny:captions", "sdxl_smpo": "tiny:pairs",
}  # fmt: skip
"""One recipe for each kind of data, and the embedded set of that kind."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_recipe_trains_a_tiny_model(name, runs, tmp_path):
    """Its method, reward and data sections as they are; model, paths and sizes tiny."""
    run = runs[name]
    judged = {"low": 0.0, "high": 1.0} if "low" in run.method else {}  # the range of judge's scores
    tiny = replace(
        run,
        output=str(tmp_path / name),
        method={**run.method, **judged},
        model=replace(run.model, path=f"tiny:{run.model.family}", vae=None, gradient_checkpointing=False),
        data=replace(
            run.data,
            path=TINY[name],
            resolution=32,
            limit=8,
            best=run.data.best and 4,
            rewards=("judge",) if run.data.rewards else (),
        ),
        optimizer=replace(run.optimizer, type="adamw"),
        training=replace(run.training, steps=1, batch_size=2, accumulation=1, mixed_precision="no"),
        logging=replace(run.logging, trackers=(), every=1),
    )
    assert align(tiny).steps == 1
    (row,) = read_json_lines(tmp_path / name / "metrics.jsonl")[:1]
    assert math.isfinite(row["loss"])


PARAMETERS = {  # of the published networks
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd21": 865_910_724,
    "kolors": 2_579_458_820,
    "sd3": 2_243_171_520,  # 3.5 Medium
    "flux": 11_901_408_320,
    "flux_kontext": 11_901_408_320,
    "qwen_image": 20_430_401_088,
    "qwen_image_edit": 20_430_401_088,
    "flux2_klein": 3_875_544_576,  # 4B
    "z_image": 6_154_908_736,
    "flux2": 32_223_281_152,
    "chroma": 8_899_983_424,
    "sana": 1_604_462_752,  # 1600M
    "lumina2": 2_609_769_152,
    "krea2": 12_820_073_036,
    "kandinsky5": 6_022_080_576,  # Image Lite
    "pixart": 610_856_096,
    "wan": 1_418_996_800,  # 2.1, 1.3B
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,  # of either expert
    "wan_i2v": 16_394_878_784,  # 2.1, 14B
    "cogvideox": 1_693_783_872,  # 2b
    "wan_ti2v": 4_999_787_712,
    "ltx": 1_923_385_472,  # 0.9
    "ltx_i2v": 1_923_385_472,
    "ltx2": 18_876_174_592,  # 19B
    "hunyuan_video15": 8_326_608_160,
    "text_to_video": 1_411_233_860,
    "animatediff": 859_520_964 + 453_209_280,  # Stable Diffusion 1.5 and the motion modules
}


@pytest.fixture(scope="module")
def built():
    """Give (devices, parameters, trained ones) of a model section, counted once: recipes share them."""
    known = {}

    def counted(model):
        if repr(model) not in known:
            network, parameters = meta_network(model, shapes_of(model))
            trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
            known[repr(model)] = {p.device.type for p in network.parameters()}, parameters, trained
        return known[repr(model)]

    return counted


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_at_its_real_size(name, runs, built):
    run = runs[name]
    devices, parameters, trained = built(run.model)
    assert devices == {"meta"}
    if not run.model.path.startswith("tiny:"):
        assert parameters == PARAMETERS.get(run.model.path, PARAMETERS[run.model.family])
    assert trained == parameters if run.model.train == "full" else 0 < trained < 0.4 * parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "sd15_dpo_lora_12gb", "sdxl_dpo_lora_12gb", "sdxl_dpo_lora_80gb", "z_image_dpo_lora_12gb",
        "qwen_image_dpo_lora_24gb",
    ],
)  # fmt: skip
def test_a_recipe_fits_the_gpu_of_its_name(name, runs):
    needed = estimate(workload_of(runs[name])).total_memory
    assert needed < 0.8 * int(name.removesuffix("gb").rpartition("_")[2]) * 2**30
