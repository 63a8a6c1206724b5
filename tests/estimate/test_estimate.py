import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import Alive
from diffalign.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TextEncoderConfig,
    TextLoraConfig,
    TrainingConfig,
    ValidationConfig,
)
from diffalign.errors import UserError
from diffalign.estimate.counting import Activations, Counts, paged_bytes, state_bytes
from diffalign.estimate.counting import count as count_workload
from diffalign.estimate.estimate import Estimate, memory
from diffalign.estimate.estimate import estimate as estimate_workload
from diffalign.estimate.shapes import Shapes, shapes_of
from diffalign.models.families.registry import FAMILIES, get_family, known_shapes
from diffalign.models.loading import load
from diffalign.models.lora import check_targets, prepare_policy
from diffalign.runs.micro_batch import rows_of, workload_of
from diffalign.runs.validate import read_run
from tests.models.conftest import MAKERS
from tests.models.inputs import conditions, states, states_of

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def run(path: str, resolution: int = 64, **changes: object) -> Run:
    return Run(model=ModelConfig(path=path, **changes), data=DataConfig(resolution=resolution))  # type: ignore[arg-type]


def estimate(run: Run, *speed: float, **more: float) -> Estimate:
    return estimate_workload(workload_of(run), *speed, **more)


def count(run: Run, shapes: Shapes) -> Counts:
    return count_workload(workload_of(run), shapes)


NETWORKS = {
    SD15: 859_520_964,
    SDXL: 2_567_463_684,
    "stabilityai/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 610_856_096,
    "PixArt-alpha/PixArt-XL-2-1024-MS": 611_349_152,
    "Tongyi-MAI/Z-Image-Turbo": 6_154_908_736,
    "Qwen/Qwen-Image": 20_430_401_088,
    "black-forest-labs/FLUX.2-klein-base-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-base-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,
    "lodestones/Chroma1-HD": 8_899_983_424,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1_604_462_752,
    "Alpha-VLLM/Lumina-Image-2.0": 2_609_769_152,
    "Kwai-Kolors/Kolors-diffusers": 2_579_458_820,
    "krea/Krea-2-Raw": 12_820_073_036,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": 591_747_872,
}


@pytest.mark.parametrize(("name", "parameters"), NETWORKS.items())
def test_real_networks_build_without_weights(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = shapes_of(ModelConfig(path=name)).network()
    assert sum(p.numel() for p in network.parameters()) == parameters
    check_targets(network, LoraConfig().targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "stabilityai/stable-diffusion-3.5-medium",
        "black-forest-labs/FLUX.1-dev",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    ],
)
def test_a_real_run_is_estimated(name: str) -> None:
    """At a small size, so that the shapes are computed quickly; the networks have their own depth."""
    result = estimate(run(name, 64, dtype="bfloat16", gradient_checkpointing=True))
    assert result.network_parameters == NETWORKS[name]
    assert result.memory["frozen weights"] == 2 * NETWORKS[name]
    assert 0 < result.trainable_parameters < 0.05 * NETWORKS[name]
    assert 0.9 < result.forward_flops / result.policy_flops < 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd15", 206_714_343),
        ("sd21", 83_653_863 + 340_387_840),
        ("sdxl", 901_374_183),
        ("sd3", 83_819_683 + 123_650_304 + 694_659_840 + 4_762_310_656),
        ("flux", 83_819_683 + 123_060_480 + 4_762_310_656),
        ("pixart", 83_653_863 + 4_762_310_656),
        ("z_image", 83_819_683 + 4_022_468_096),
        ("flux2_klein", 84_046_115 + 4_022_468_096),
        ("qwen_image", 126_892_531 + 8_292_166_656),
        ("flux2", 84_046_115 + 24_011_361_280),
        ("chroma", 83_819_683 + 4_762_310_656),
        ("sana", 312_250_275 + 2_614_341_888),
        ("lumina2", 83_819_683 + 2_614_341_888),
        ("kolors", 83_653_863 + 6_243_584_000),
        ("krea2", 126_892_531 + 4_437_815_808),
        ("kandinsky5", 83_819_683 + 8_292_166_656 + 123_060_480),
    ],
)
def test_real_encoders(name: str, parameters: int) -> None:
    """VAE 83,653,863, of 16 channels 83,819,683; CLIP ViT-L/14 text 123,060,480, with its projection
    123,650,304; OpenCLIP ViT-bigG/14 text 694,659,840; T5 XXL's encoder 4,762,310,656;
    Qwen3-4B 4,022,468,096; Qwen2.5-VL-7B 8,292,166,656; Mistral Small 3 24,011,361,280; Gemma 2 2B
    2,614,341,888; Qwen3-VL-4B 4,437,815,808; ChatGLM3-6B
    6,243,584,000; DC-AE f32c32 of SANA 312,250,275.
    """
    family = get_family(name)
    assert Shapes(family, family.configs).encoder_parameters() == parameters


def test_sdxl_at_1024() -> None:
    """Issue 2, part 8: 6.76 TFLOP forward at 2 per multiply-add."""
    result = estimate(
        replace(run(SDXL, 1024, dtype="bfloat16"), method={"type": "dpo"}), tflops=1000, utilisation=0.5
    )
    rows = dict(result.rows())
    assert rows["network parameters"] == "2,567,463,684"
    assert rows["forward of one image"] == "6.76 TFLOP"
    assert result.trainable_parameters == 23_224_320  # rank 16 on to_q, to_k, to_v, to_out
    assert result.memory["frozen weights"] == 2 * 2_567_463_684
    assert result.memory["trained weights (float32)"] == 4 * 23_224_320
    # under LoRA: one forward's worth of input gradients, attention's backward being 2.5 times its forward
    assert 1.1 < result.backward_flops / result.forward_flops < 1.2
    assert result.flops_per_pair == 2 * (result.forward_flops + result.policy_flops + result.backward_flops)
    assert result.pairs_per_second == pytest.approx(500e12 / result.flops_per_pair)


def test_sd15_at_512() -> None:
    result = estimate(run(SD15, 512, train="full", gradient_checkpointing=True))
    rows = dict(result.rows())
    assert rows["network parameters"] == "859,520,964"
    assert rows["forward of one image"] == "0.80 TFLOP"
    assert 1.95 < result.backward_flops / result.forward_flops < 2.15
    assert result.flops_per_pair == 2 * (3 * result.forward_flops + result.backward_flops)
    assert result.memory["optimizer state (adamw)"] == 8 * 859_520_964
    assert result.memory["reference copy"] == 4 * 859_520_964
    assert result.seconds is None


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_gives_its_own_shapes(folders: dict[str, Path], name: str) -> None:
    model = load(ModelConfig(path=str(folders[name])))
    result = estimate(run(str(folders[name]), train="full"))  # LoRA's targets differ by family
    assert result.family == name
    assert result.network_parameters == sum(p.numel() for p in model.network.parameters())
    parts = [model.pipeline.vae] + [getattr(model.pipeline, part) for part in model.text_encoders]
    assert result.encoder_parameters == sum(p.numel() for part in parts for p in part.parameters())
    assert json.loads(json.dumps(result.as_dict()))["total_memory"] == sum(result.memory.values())


@pytest.mark.parametrize(
    "lora", [LoraConfig(rank=4), LoraConfig(rank=2, dora=True), LoraConfig(targets=("conv1",))]
)
def test_trainable_parameters_are_those_of_the_run(folders: dict[str, Path], lora: LoraConfig) -> None:
    config = ModelConfig(path=str(folders["sdxl"]), lora=lora)
    expected = sum(p.numel() for _, p in prepare_policy(load(config), config))
    assert estimate(run(str(folders["sdxl"]), lora=lora)).trainable_parameters == expected


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize(
    "name",
    [
        "sdxl", "sd3", "flux", "pixart", "z_image", "flux2_klein", "qwen_image", "flux2", "chroma", "sana",
        "lumina2", "krea2", "kandinsky5",
    ],
)  # fmt: skip
def test_fake_activations_are_the_real_ones(
    folders: dict[str, Path], name: str, checkpointing: bool | int
) -> None:
    """The same count over a real forward in memory."""
    config = ModelConfig(path=str(folders[name]), train="full", gradient_checkpointing=checkpointing)
    model = load(config)
    prepare_policy(model, config)
    x_t, t = states_of(model)
    cond = conditions(model, ["a", "b"])
    if "encoder_attention_mask" in cond:  # prompts that fill their tokens are what is counted
        cond["encoder_attention_mask"] = torch.ones_like(cond["encoder_attention_mask"])
    activations = Activations(model.network, checkpointing)
    with activations.watch():
        model.denoiser()(x_t, t, cond)
    told = count(
        run(str(folders[name]), 8 * model.downscale, train="full", gradient_checkpointing=checkpointing),
        shapes_of(config),
    )
    # These two make tables of positions in the forward that is counted, which a meta device does not keep.
    tolerance = 2e-3 if name in ("lumina2", "krea2") else 0
    assert activations.bytes > 0 and told.activations == pytest.approx(activations.bytes, rel=tolerance)


def test_checkpointing_trades_memory_for_flops(folders: dict[str, Path]) -> None:
    plain = estimate(run(str(folders["sdxl"])))
    saving = estimate(run(str(folders["sdxl"]), gradient_checkpointing=True))
    assert saving.memory["activations"] < plain.memory["activations"]
    assert saving.flops_per_pair == plain.flops_per_pair + 2 * plain.policy_flops


@pytest.mark.parametrize(("path", "side"), [("tiny:sdxl", 32), ("tiny:sd3", 8)])
def test_the_peak_of_every_nth_block_is_known(path: str, side: int) -> None:
    """Of a forward and backward in memory: what is beyond saved activations, such as their gradients, is of
    one size, whatever is checkpointed."""
    peaks, told, flops = [], [], []
    for every in (False, 3, 2, True):
        config = ModelConfig(path=path, gradient_checkpointing=every)
        model = load(config)
        prepare_policy(model, config)
        x_t, t = states(8, side, model.codec.channels(model.pipeline.vae.config))
        cond = conditions(model, ["a"] * 8)
        with Alive() as alive:
            model.denoiser()(x_t, t, cond).square().sum().backward()
        made = run(path, side * model.downscale, gradient_checkpointing=every)
        result = estimate(replace(made, training=TrainingConfig(batch_size=4)))
        peaks.append(alive.peak)
        told.append(result.memory["activations"])
        flops.append(result.flops_per_pair)
    assert peaks == sorted(peaks, reverse=True) and len({*peaks}) == 4
    assert told == sorted(told, reverse=True) and flops == sorted(flops) and len({*flops}) == 4
    beyond = [peak - one for peak, one in zip(peaks, told, strict=True)]
    assert min(beyond) > 0 and max(beyond) - min(beyond) < 0.1 * peaks[0]


def test_a_batch_scales_activations_and_not_weights(folders: dict[str, Path]) -> None:
    one = run(str(folders["sdxl"]))
    four = replace(one, training=TrainingConfig(batch_size=4, accumulation=3))
    small, large = estimate(one), estimate(four)
    assert large.memory["latents and conditions"] == 4 * small.memory["latents and conditions"]
    assert 3.5 < large.memory["activations"] / small.memory["activations"] <= 4
    assert large.memory["frozen weights"] == small.memory["frozen weights"]
    assert (large.pairs_per_step, small.pairs_per_step) == (12, 1)
    assert large.flops_per_pair == small.flops_per_pair


def test_parts_appear_with_what_needs_them(folders: dict[str, Path]) -> None:
    base = run(str(folders["sdxl"]), train="full", dtype="bfloat16")
    averaged = replace(base, training=TrainingConfig(ema_decay=0.99, mixed_precision="bf16"))
    counts = count(base, shapes_of(base.model))
    parameters = counts.network_parameters
    assert memory(workload_of(base), counts)["reference copy"] == 4 * parameters
    assert memory(workload_of(averaged), counts)["reference copy"] == 2 * parameters
    assert memory(workload_of(averaged), counts)["moving average"] == 4 * parameters
    assert "frozen weights" not in memory(workload_of(base), counts)
    alone = replace(base, method={"type": "sft"})
    assert not workload_of(alone).needs_reference
    assert "reference copy" not in memory(workload_of(alone), counts)


def test_devices_that_share_tokens_share_activations_and_time(folders: dict[str, Path]) -> None:
    alone = replace(run(str(folders["flux"])), training=TrainingConfig(batch_size=2))
    shared = replace(alone, training=TrainingConfig(batch_size=2, context=2))
    one, two = (estimate(each, 1.0) for each in (alone, shared))
    assert two.memory["activations"] == math.ceil(one.memory["activations"] / 2)
    assert {**two.memory, "activations": 0} == {**one.memory, "activations": 0}
    assert two.pairs_per_step == one.pairs_per_step == 2
    assert one.seconds is not None and two.seconds == pytest.approx(one.seconds / 2)
    assert ("pairs per step and group of 2 devices", "2") in two.rows()
    assert ("pairs per step and device", "2") in one.rows()


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("adamw", (100, 50), 40_000),
        ("adafactor", (100, 50), 600),
        ("adafactor", (50,), 200),
        ("adamw8bit", (100, 50), 2 * 5000 + 8 * 20),
        ("adamw8bit", (50,), 400),
        ("paged_adamw", (100, 50), 40_000),
        ("paged_adamw8bit", (100, 50), 2 * 5000 + 8 * 20),
    ],
)
def test_optimizer_state(kind: str, shape: tuple[int, ...], expected: int) -> None:
    assert state_bytes(torch.zeros(shape), OptimizerConfig(type=kind)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("adamw8bit", (400, 256), 0),
        ("paged_adamw", (400, 256), 8 * 102_400),
        ("paged_adamw8bit", (400, 256), 2 * 102_400),
        ("paged_adamw", (300, 256), 0),  # under 100,000 elements
    ],
)
def test_what_of_an_optimizer_may_leave_the_device(kind: str, shape: tuple[int, ...], expected: int) -> None:
    assert paged_bytes(torch.zeros(shape), OptimizerConfig(type=kind)) == expected  # type: ignore[arg-type]


def test_paged_moments_are_told_apart() -> None:
    """Of SD 1.5, all weights: moments of large tensors leave the memory of the device."""
    plain = run(SD15, 64, train="full")
    paged = replace(plain, optimizer=replace(plain.optimizer, type="paged_adamw"))
    one, other = estimate(plain), estimate(paged)
    left = other.memory["optimizer state (paged_adamw)"]
    assert one.paged == 0 and other.paged > 0
    assert left + other.paged == one.memory["optimizer state (adamw)"] == 8 * one.trainable_parameters
    assert one.total_memory - other.total_memory == other.paged
    assert any(name.startswith("main memory, or") for name, _ in other.rows())


ROWS = [
    ("dpo", {"samples": 4}, {}, 4),
    ("dpo", {"prompts": "", "samples": 4}, {}, 2),
    ("spo", {"samples": 4}, {}, 2),
    ("flow_grpo", {"samples": 24, "advantage": "group"}, {}, 24),
    ("flow_grpo", {"samples": 24, "part": 2, "advantage": "group"}, {}, 2),
    ("awm", {"samples": 24, "part": 2, "advantage": "group"}, {"strata": 6}, 12),
    ("dgpo", {"samples": 24, "advantage": "group"}, {"strata": 4, "fraction": 0.7}, 96),
    ("diffusion_nft", {"samples": 8, "part": 8, "steps": 10}, {"strata": None, "fraction": 0.99}, 72),
]


@pytest.mark.parametrize(("method", "rollout", "time", "rows"), ROWS)
def test_rows_of_a_micro_batch(method: str, rollout: dict, time: dict, rows: int) -> None:  # type: ignore[type-arg]
    """Two groups of each: all samples of a prompt or a part of them, at all times that they are shown at."""
    section = {"type": method} | (
        {"time": {"type": "stratified", "over": "discrete", **time}} if time else {}
    )
    made = Run(
        method=section,
        rollout=RolloutConfig(**{"prompts": "tiny:train", **rollout}),
        training=TrainingConfig(batch_size=2),
    )
    assert rows_of(made) == 2 * rows


def test_online_memory_grows_with_the_samples_of_a_prompt(folders: dict[str, Path]) -> None:
    pair = run(str(folders["sdxl"]))
    online = replace(pair, rollout=RolloutConfig(prompts="tiny:train", samples=8, resolution=32))
    large = replace(online, rollout=replace(online.rollout, resolution=64))
    few, many, larger = (estimate(r).memory["latents and conditions"] for r in (pair, online, large))
    assert larger == 4 * few and many < larger
    with pytest.raises(UserError, match=r"tflops=1.0 with rollout.prompts"):
        estimate(online, 1.0)


def test_online_videos_have_all_their_frames(videos: dict[str, Path]) -> None:
    """As many rows of videos take what they take offline."""
    offline = run(str(videos["wan"]))
    offline = replace(offline, data=DataConfig(resolution=32, frames=5))
    online = replace(
        offline,
        rollout=RolloutConfig(prompts="tiny:train", samples=2),
        data=DataConfig(frames=5, height=32, width=32),
    )
    assert workload_of(online).rows == workload_of(offline).rows == 2
    assert estimate(online).size == estimate(offline).size == (32, 32, 5)
    for part in ("activations", "latents and conditions"):
        assert estimate(online).memory[part] == estimate(offline).memory[part]


@pytest.mark.parametrize(("every", "rollout"), [(0, {}), (5, {}), (0, {"prompts": "tiny:train"})])
def test_samples_of_one_expert_take_the_weights_of_both(
    videos: dict[str, Path],
    every: int,
    rollout: dict,  # type: ignore[type-arg]
) -> None:
    plain = run(str(videos["wan_a14b"]), expert="high", dtype="bfloat16")
    made = replace(
        plain,
        data=DataConfig(height=32, width=32, frames=5),
        validation=ValidationConfig(every=every),
        rollout=RolloutConfig(**rollout),
    )
    told = estimate(made).memory
    both = bool(every or rollout)
    assert told.get("frozen weights of the other expert", 0) == (told["frozen weights"] if both else 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (run("somebody/some-model"), f"model.family set to one of {', '.join(FAMILIES)}"),
        (run(SDXL, family="sd15"), "is sdxl; set auto"),
        (run(""), "model.path is empty"),
        (run(SD15, 100), "100 x 100 pixels; allowed with sd15: multiples of 8"),
        (run(SD15, lora=LoraConfig(targets=("x",))), "matches no linear"),
    ],
)
def test_what_cannot_be_estimated_is_a_user_error(wrong: Run, message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate(wrong)


@pytest.mark.parametrize("arguments", [{"tflops": 0.0}, {"utilisation": 1.5}])
def test_impossible_speeds_are_user_errors(folders: dict[str, Path], arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match="allowed: more than 0"):
        estimate(run(str(folders["sdxl"])), **arguments)


def test_an_unknown_hub_id_has_its_familys_shapes_if_told() -> None:
    assert shapes_of(ModelConfig(path="somebody/fine-tuned-xl", family="sdxl")).family.name == "sdxl"
    for card in FAMILIES.values():
        assert card.example in known_shapes()


@pytest.mark.parametrize("encoders", [(), ("text_encoder",)])
def test_text_encoders_that_are_trained_are_counted(encoders: tuple[str, ...]) -> None:
    """Of the tiny SDXL: width 48, three layers each, the first one's last layer being unread."""
    plain = read_run("tiny_sdxl_dpo")
    lora = TextLoraConfig(rank=4, encoders=encoders)
    trained = replace(plain, model=replace(plain.model, text_encoder=TextEncoderConfig(lora)))
    one, other = estimate(plain), estimate(trained)
    layers = 2 if encoders else 2 + 3
    more = other.trainable_parameters - one.trainable_parameters
    assert more == layers * 4 * 4 * 2 * 48  # four modules of a layer, rank 4, two factors
    assert other.memory["optimizer state (adamw)"] - one.memory["optimizer state (adamw)"] == 8 * more
    assert other.memory["text encoders that are trained"] == (343_872 if encoders else 696_960)
    assert other.memory["activations"] > one.memory["activations"]
    assert other.forward_flops > one.forward_flops
