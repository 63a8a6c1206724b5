"""Models of two experts (Wan 2.2 A14B), on a tiny random pipeline of the real classes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.spans import in_span
from diffalign.diffusion.times import Listed, LogitNormal, Uniform, fitted
from diffalign.errors import UserError
from diffalign.estimate.shapes import shapes_of
from diffalign.export.aligned import load_aligned, open_aligned
from diffalign.export.job import Export, export
from diffalign.media.videos import Video, write_video
from diffalign.models.denoisers import NetworkDenoiser
from diffalign.models.families.registry import get_family
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.placing import move_networks
from diffalign.models.precision import only_errors
from diffalign.runs.align import align
from diffalign.runs.load_pipeline import open_model
from diffalign.runs.micro_batch import workload_of

BOUNDARY = 0.875
SIZE = (32, 48, 5)
HIGH, LOW = RectifiedFlow(span=(BOUNDARY, 1.0)), RectifiedFlow(span=(0.0, BOUNDARY))
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six pairs of videos of noise."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for number in range(6):
        names = [f"{number}-{side}.mp4" for side in "ab"]
        for name, seed in zip(names, (2 * number, 2 * number + 1), strict=True):
            levels = np.random.default_rng(seed).integers(0, 256, (SIZE[2], 3, 4, 6), dtype=np.uint8)
            frames = torch.from_numpy(levels).repeat_interleave(8, 2).repeat_interleave(8, 3)
            write_video(Video(frames, 8.0), folder / name)
        rows.append(json.dumps({"prompt": f"circle {'abcdef'[number]}", "videos": names, "scores": [1, 0]}))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "pairs.jsonl"


def run_of(path: Path, clips: Path, output: Path, expert: Any, **time: Any) -> Run:
    height, width, frames = SIZE
    return Run(
        output=str(output),
        method={"type": "dpo", "beta": 100, **({"time": time} if time else {})},
        model=ModelConfig(path=str(path), expert=expert, lora=LoraConfig(rank=2)),
        data=DataConfig(path=str(clips), height=height, width=width, frames=frames, fps=8, holdout=0.4),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(steps=2, batch_size=2),
        logging=LoggingConfig(every=1, trackers=(), diagnostics_bins=2),
        checkpoint=CheckpointConfig(every=2),
    )


@pytest.fixture(scope="session")
def trained(videos: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the expert for high noise, and then that for low noise from its run; return their folder."""
    root, say = tmp_path_factory.mktemp("experts"), (lambda line: None)
    with only_errors("diffusers"):
        align(run_of(videos["wan_a14b"], clips, root / "high", "high"), say)
        align(run_of(root / "high", clips, root / "low", "low"), say)
    return root


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def frames_of(pipeline: Any) -> Tensor:
    """Return the stock sampler's video of four steps, two above the boundary and two below it."""
    height, width, count = SIZE
    pipeline.set_progress_bar_config(disable=True)
    drawn: Tensor = pipeline(
        "a red circle", height=height, width=width, num_frames=count, num_inference_steps=4,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames  # fmt: skip
    return drawn


@pytest.mark.parametrize(("path", "low", "high"), [(HIGH, BOUNDARY, 1.0), (LOW, 0.0, BOUNDARY)])
@pytest.mark.parametrize("sampler", [Uniform(), LogitNormal(shift=5.0), LogitNormal(steps=1000)])
def test_times_are_those_of_the_expert_and_distributed_as_before(
    sampler: Any, path: RectifiedFlow, low: float, high: float
) -> None:
    """Held against the same sampler's draws for all times, those of the expert picked by hand."""
    drawn = fitted(sampler, path, (16, 2, 4, 6))(4000, torch.Generator().manual_seed(0))
    every = fitted(sampler, RectifiedFlow(), (16, 2, 4, 6))(80_000, torch.Generator().manual_seed(1))
    kept = every[(every >= low) & ((every < high) | (high == 1))]
    assert drawn.min() >= low and (drawn.max() < high or high == 1)
    spread = float(kept.std()) / math.sqrt(min(len(kept), len(drawn)))
    assert abs(float(drawn.mean() - kept.mean())) < 5 * spread


def test_the_boundary_belongs_to_high_noise_as_in_the_stock_pipeline() -> None:
    t = torch.tensor([0.874, 0.875, 0.876, 1.0, 0.0])
    assert in_span(HIGH, t).tolist() == [False, True, True, True, False]
    assert in_span(LOW, t).tolist() == [True, False, False, False, True]
    whole = replace(HIGH, integer_times=True)  # UniPC tells 874 of 874.9
    assert in_span(whole, torch.tensor([0.8749, 0.8751])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("sampler", "path", "message"),
    [
        (Uniform(0.0, 0.5), HIGH, r"times 0 to 0.5.*called at 0.875 to 1"),
        (Uniform(0.5, 1.0), HIGH, r"times 0.5 to 1.*called at 0.875 to 1"),
        (Listed((0.2, 0.9)), LOW, r"times 0.2 to 0.9.*called at 0 to 0.875"),
    ],
)
def test_a_range_of_times_outside_of_the_experts_is_an_error_naming_both(
    sampler: Any, path: RectifiedFlow, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fitted(sampler, path, (16, 2, 4, 6))
    inside = fitted(Uniform(0.9, 1.0), HIGH, (16, 2, 4, 6))(1000, torch.Generator().manual_seed(0))
    assert inside.min() > 0.9


def test_a_batch_of_mixed_times_asks_each_expert_its_own(videos: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(videos["wan_a14b"])))
    x = torch.randn(3, *model.latent_shape(*SIZE), generator=torch.Generator().manual_seed(1))
    t, cond = torch.tensor([0.9, 0.3, 0.875]), model.encode_prompts(["a", "b", "c"])
    with torch.no_grad():
        together = model.sampler()(x, t, cond)
        for row, network in enumerate(("transformer", "transformer_2", "transformer")):
            one: NetworkDenoiser = replace(model.denoiser(), network=getattr(model.pipeline, network))
            alone = one(x[row : row + 1], t[row : row + 1], {k: v[row : row + 1] for k, v in cond.items()})
            assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_one_expert_is_loaded_for_training_and_one_must_be_named(videos: dict[str, Path]) -> None:
    base = ModelConfig(path=str(videos["wan_a14b"]))
    for expert, own, other in (
        ("high", "transformer", "transformer_2"),
        ("low", "transformer_2", "transformer"),
    ):
        model = load(replace(base, expert=expert), trained=True, alone=True)  # type: ignore[arg-type]
        assert model.network is getattr(model.pipeline, own)
        assert getattr(model.pipeline, other) is None
        assert shapes_of(replace(base, expert=expert)).family.network_name == own  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model.expert is null.*two experts.*high, then low"):
        load(base, trained=True)
    with pytest.raises(UserError, match=r"model.expert='low', but .* has one network"):
        load(ModelConfig(path=str(videos["wan"]), expert="low"))


def test_a_run_trains_its_expert_alone_at_its_times(trained: Path, videos: dict[str, Path]) -> None:
    """The loss starts at log 2; the held-out pairs are measured at the expert's times."""
    for name in ("high", "low"):
        assert losses(trained / name)[0] == pytest.approx(math.log(2), abs=1e-5)
        held_out = (trained / name / "metrics.jsonl").read_text()
        assert ("0.88-0.94" in held_out) == (name == "high") and ("0-0.44" in held_out) == (name == "low")
    assert {p.name for p in (trained / "high" / "aligned").iterdir()} == {"README.md", "high_noise"}
    model = load_aligned(
        ModelConfig(path=str(videos["wan_a14b"]), expert="high"), trained / "high" / "aligned"
    )
    assert getattr(model.transformer, "peft_config", None)
    assert not getattr(model.transformer_2, "peft_config", None)


def test_both_adapters_are_saved_and_plain_diffusers_draws_the_same_frames(
    trained: Path, videos: dict[str, Path]
) -> None:
    folder = trained / "low" / "aligned"
    carried = load_file(folder / "high_noise" / FILE)
    for name, tensor in load_file(trained / "high" / "aligned" / "high_noise" / FILE).items():
        assert torch.equal(carried[name], tensor)
    config = ModelConfig(path=str(videos["wan_a14b"]), expert="low")
    ours = frames_of(open_aligned(config, folder).pipeline)
    plain = WanPipeline.from_pretrained(videos["wan_a14b"])
    base = frames_of(plain)
    plain.load_lora_weights(str(folder), subfolder="high_noise", weight_name=FILE)
    first = frames_of(plain)
    plain.load_lora_weights(
        str(folder), subfolder="low_noise", weight_name=FILE, load_into_transformer_2=True
    )
    assert_close(frames_of(plain), ours, rtol=0, atol=1e-5)
    assert_close(frames_of(open_model(str(trained / "low"), None, "cpu").pipeline), ours, rtol=0, atol=1e-5)
    step = str(trained / "low" / "checkpoints" / "step-2")
    assert_close(frames_of(open_model(step, None, "cpu").pipeline), ours, rtol=0, atol=1e-5)
    for one, other in ((base, first), (first, ours), (base, ours)):
        assert float((one - other).abs().max()) > 1e-4


def test_the_lines_of_the_card_load_both(trained: Path) -> None:
    text = (trained / "low" / "aligned" / "README.md").read_text()
    assert "high noise (`transformer`) and that for low noise (`transformer_2`)" in text
    block = (
        text.split("```python")[1]
        .split("```")[0]
        .replace("path/to/this/folder", str(trained / "low" / "aligned"))
    )
    lines = [line for line in block.splitlines() if not line.startswith("video =")]
    here: dict[str, Any] = {}
    exec("\n".join(lines), here)
    assert here["pipeline"].transformer.peft_config and here["pipeline"].transformer_2.peft_config
    assert "load that first" not in text  # nothing is under the low expert's adapter


def test_exports_hold_both_experts(trained: Path, videos: dict[str, Path], tmp_path: Path) -> None:
    base = ModelConfig(path=str(trained / "high"), expert="low")
    folder = trained / "low" / "aligned"
    export(base, folder, Export("comfyui", tmp_path / "two.safetensors"), say=lambda line: None)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"two_high_noise.safetensors", "two_low_noise.safetensors"}
    files = [load_file(tmp_path / name) for name in sorted(names)]
    assert files[0].keys() == files[1].keys()
    assert any(not torch.equal(files[0][key], files[1][key]) for key in files[0])
    export(base, folder, Export("merged", tmp_path / "whole"), say=lambda line: None)
    merged = WanPipeline.from_pretrained(tmp_path / "whole")
    ours = open_aligned(ModelConfig(path=str(videos["wan_a14b"]), expert="low"), folder)
    assert_close(frames_of(merged), frames_of(ours.pipeline), rtol=0, atol=1e-4)
    export(base, folder, Export("diffusers", tmp_path / "again"), say=lambda line: None)
    for part in ("high_noise", "low_noise"):
        written, kept = (load_file(where / part / FILE) for where in (tmp_path / "again", folder))
        for name, tensor in kept.items():
            assert_close(written[name], tensor)


@pytest.mark.parametrize("every", [0, 2])
def test_validation_has_both_on_the_device(
    videos: dict[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Both rest in main memory while the set is encoded; `estimate` says whether there are two."""
    run = run_of(videos["wan_a14b"], clips, tmp_path / "run", "low")
    drawn = replace(run.validation, every=every, prompts=("a red circle",), sampling_steps=2, guidance=1.0)
    moved: list[tuple[int, object, bool]] = []

    def moving(model: LoadedModel, device: torch.device, trained: bool = True) -> None:
        moved.append((len(model.networks), device, trained))
        move_networks(model, device, trained)

    monkeypatch.setattr("diffalign.runs.setup.move_networks", moving)
    run = replace(run, validation=drawn)
    align(run, lambda line: None)
    assert moved == [(2 if every else 1, torch.device("cpu"), True)]
    assert workload_of(run).both_experts == bool(every)


def test_networks_move_together_or_but_the_trained_one(videos: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(videos["wan_a14b"]), expert="low"))
    move_networks(model, "meta", trained=False)
    there = {name: next(n.parameters()).device.type for name, n in model.networks.items()}
    assert there == {"transformer_2": "cpu", "transformer": "meta"}
    move_networks(model, "meta")
    assert all(p.device.type == "meta" for n in model.networks.values() for p in n.parameters())


def test_samples_of_a_run_are_drawn_with_both(videos: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    run = run_of(videos["wan_a14b"], clips, tmp_path / "run", "low")
    drawn = replace(run.validation, every=2, prompts=("a red circle",), sampling_steps=2, guidance=1.0)
    said: list[str] = []
    result = align(replace(run, validation=drawn), said.append)
    assert len(list((result.output / "samples" / "step-000002").glob("*.mp4"))) == 1
    assert "expert: low noise, transformer_2, times 0 to 0.875" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"train": "full"}}, "model.train='full' with model.expert=high"),
        ({"method": {"type": "inversion_dpo"}}, "model.expert=high with method inversion_dpo"),
        ({"method": {"time": {"low": 0.2, "high": 0.5}}}, "times 0.2 to 0.5.*called at 0.875 to 1"),
    ],
)
def test_what_an_expert_cannot_do_is_refused(
    videos: dict[str, Path], clips: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = run_of(videos["wan_a14b"], clips, tmp_path / "run", "high")
    method = {**run.method, **change.get("method", {})}
    if method["type"] != "dpo":
        method.pop("beta")
    run = replace(run, method=method, model=replace(run.model, **change.get("model", {})))
    with pytest.raises(UserError, match=message):
        align(run, lambda line: None)


def test_each_expert_has_the_published_size() -> None:
    """14.29 billion parameters each: the A14B has 27 billion in all, of which 14 are active."""
    for expert, name in (("high", "transformer"), ("low", "transformer_2")):
        config = ModelConfig(path="Wan-AI/Wan2.2-T2V-A14B-Diffusers", expert=expert)  # type: ignore[arg-type]
        shapes = shapes_of(config)
        with torch.device("meta"):
            network = shapes.network()
        assert shapes.family.network_name == name and shapes.family.name == get_family("wan").name
        assert sum(p.numel() for p in network.parameters()) == 14_288_491_584
        assert shapes.latent_shape(480, 832, 81) == (16, 21, 60, 104)
