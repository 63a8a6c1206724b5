import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.export.aligned import load_aligned, open_aligned, save_aligned, save_merged
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import prepare_policy
from tests.tiny_pipelines import make_pixart, make_sd15, make_sdxl

PLAIN = """
import json, sys
sys.modules["diffalign"] = None  # whoever imports it gets a ModuleNotFoundError
import numpy, torch
from diffusers import DiffusionPipeline
for name, (base, lora) in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(base)
    if lora:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a red circle", num_inference_steps=3, height=64, width=64,
                    generator=torch.manual_seed(5), output_type="np").images[0]
    numpy.save(name, made)
"""
"""What a user does, in a process that has no diffalign."""

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "lora": ("sd15", {"lora": LoraConfig(rank=2)}),
    "rslora": ("sdxl", {"lora": LoraConfig(rank=4, alpha=8.0, rslora=True)}),
    "dora": (
        "sdxl",
        {"lora": LoraConfig(rank=2, alpha=3.0, dora=True, targets=("to_q", "to_out.0", "conv1", "ff.net.2"))},
    ),
    "full-sd15": ("sd15", {"train": "full"}),
    "full-sdxl": ("sdxl", {"train": "full"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd15": make_sd15(root / "sd15"),
        "sdxl": make_sdxl(root / "sdxl"),
        "pixart": make_pixart(root / "pixart"),
    }


def trained(config: ModelConfig) -> LoadedModel:
    """Return a model whose trainable weights have been pushed far enough to be seen in its images."""
    model = load(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in prepare_policy(model, config):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.network.eval()
    return model


def image(pipeline: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    made: np.ndarray = pipeline(  # type: ignore[operator]
        "a red circle",
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.manual_seed(5),
        output_type="np",
    ).images[0]
    return made


@pytest.mark.parametrize(
    ("family", "alpha", "architecture"),
    [
        ("sd15", None, "stable-diffusion-v1/lora"),  # diffusers' layout
        ("sd15", 4.0, "stable-diffusion-v1/lora"),  # kohya's
        ("pixart", None, "pixart-sigma/lora"),  # peft's
    ],
)
def test_a_lora_names_its_base_which_is_compared(
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    alpha: float | None,
    architecture: str,
) -> None:
    config = ModelConfig(path=str(folders[family]), lora=LoraConfig(rank=2, alpha=alpha))
    save_aligned(trained(config), tmp_path / "mine", "")
    with safe_open(next((tmp_path / "mine").glob("*.safetensors")), "pt") as file:
        header = file.metadata()
    assert header["ss_sd_model_name"] == family  # the folder's name: the path is the user's own
    assert (header["modelspec.architecture"], header["modelspec.title"]) == (architecture, "mine")
    other = shutil.copytree(folders[family], tmp_path / "other")
    for base, told in ((folders[family], False), (other, True)):
        caplog.clear()
        open_aligned(ModelConfig(path=str(base)), tmp_path / "mine")
        assert (f"another base than {base}: its ss_sd_model_name is {family}" in caplog.text) == told


@pytest.fixture(scope="module")
def images(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every case, our own image and the one made from ``aligned/`` without diffalign."""
    root = tmp_path_factory.mktemp("aligned")
    ours, jobs = {}, {}
    for name, (family, changes) in CASES.items():
        model = trained(ModelConfig(path=str(folders[family]), **changes))  # type: ignore[arg-type]
        save_aligned(model, root / name, f"card of {name}")
        ours[name] = image(model.pipeline)
        full = name.startswith("full")
        jobs[name] = (str(root / name), "") if full else (str(folders[family]), str(root / name))
        files = {f.name for f in (root / name).iterdir()}
        assert ("model_index.json" in files) == full
        assert ("pytorch_lora_weights.safetensors" in files) != full
        assert (root / name / "README.md").read_text() == f"card of {name}"
    # Sums are rounded otherwise by another number of threads, and other tests may have set it here.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, json.dumps(jobs)],
        check=True,
        cwd=root,
        capture_output=True,
        env={**os.environ, **threads},
    )
    return {name: (ours[name], np.load(root / f"{name}.npy")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_makes_the_same_image(
    images: dict[str, tuple[np.ndarray, np.ndarray]], folders: dict[str, Path], name: str
) -> None:
    ours, theirs = images[name]
    assert np.abs(ours - theirs).max() <= (1e-5 if name == "dora" else 0)  # its scale is folded in
    base = load(ModelConfig(path=str(folders[CASES[name][0]]))).pipeline
    assert np.abs(ours - image(base)).max() > 0.01


def test_aligned_folders_load_back(folders: dict[str, Path], tmp_path: Path) -> None:
    for train in ("lora", "full"):
        base = ModelConfig(path=str(folders["sdxl"]), train=train)  # type: ignore[arg-type]
        model = trained(base)
        save_aligned(model, tmp_path / train, "card")
        assert np.array_equal(image(load_aligned(base, tmp_path / train)), image(model.pipeline))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_make_the_adapters_image(folders: dict[str, Path], tmp_path: Path, dora: bool) -> None:
    base = ModelConfig(path=str(folders["sdxl"]), lora=LoraConfig(rank=2, alpha=4.0, dora=dora))
    model = trained(base)
    save_aligned(model, tmp_path / "aligned", "card")
    save_merged(base, tmp_path / "aligned", tmp_path / "merged", "merged card")
    merged = load(ModelConfig(path=str(tmp_path / "merged")))
    names: dict[str, Tensor] = dict(merged.network.named_parameters())
    assert names.keys() == dict(load(base).network.named_parameters()).keys()
    assert np.allclose(image(merged.pipeline), image(model.pipeline), atol=1e-4)
    assert (tmp_path / "merged" / "README.md").read_text() == "merged card"


def test_wrong_loras_are_user_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    sd15, sdxl = (ModelConfig(path=str(folders[name]), lora=LoraConfig(rank=2)) for name in ("sd15", "sdxl"))
    with pytest.raises(UserError, match=r"no pytorch_lora_weights.safetensors"):
        save_merged(sdxl, tmp_path, tmp_path / "merged", "")
    with pytest.raises(UserError, match=r"neither pytorch_lora_weights.safetensors nor model_index.json"):
        load_aligned(sdxl, tmp_path)
    save_aligned(trained(sd15), tmp_path / "aligned", "card")
    with pytest.raises(UserError, match="aligned"):
        load_aligned(sdxl, tmp_path / "aligned")
    (tmp_path / "aligned" / "pytorch_lora_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="aligned"):
        load_aligned(sd15, tmp_path / "aligned")
    assert not (tmp_path / "merged").exists()


def test_what_train_leaves_says_its_strength_to_every_reader(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Readers of tensors take alpha / rank of the alpha tensor, else 1; diffusers its metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from diffalign.models.lora import ADAPTER
    from tests.tiny_pipelines import make_pixart, make_sd3

    others = {"sd3": make_sd3(tmp_path / "sd3"), "pixart": make_pixart(tmp_path / "pixart")}
    for name in ("sd15", "sdxl", "sd3", "pixart"):
        config = ModelConfig(
            path=str((folders | others)[name]), lora=LoraConfig(rank=4, alpha=8.0, rslora=True)
        )
        model = trained(config)
        save_aligned(model, tmp_path / f"{name}-lora", "card")
        (file,) = (tmp_path / f"{name}-lora").glob("*.safetensors")
        state = load_file(file)
        ups = {k: v for k, v in state.items() if k.endswith((".lora_up.weight", ".lora_B.weight"))}
        layers = {n: m for n, m in model.network.named_modules() if hasattr(m, "lora_A") and m.lora_A}
        assert len(ups) == len(layers) > 0
        for key, up in ups.items():
            stem = key.rsplit(".lora_", 1)[0]
            down = state[key.replace("lora_up", "lora_down").replace("lora_B", "lora_A")]
            alpha = state.get(f"{stem}.alpha", torch.tensor(4.0))
            if name in ("sd15", "sdxl"):
                assert float(alpha) == 16.0  # 8 / sqrt(4) = 16 / 4
            product = float(alpha) / 4 * up.flatten(1) @ down.flatten(1)
            assert any(
                product.shape
                == (b := m.lora_B[ADAPTER].weight.flatten(1) @ m.lora_A[ADAPTER].weight.flatten(1)).shape
                and torch.allclose(product, 4 * b, atol=1e-5)
                for m in layers.values()
            ), key
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        if name == "sd3":
            values = json.loads(metadata["lora_adapter_metadata"])
            assert values["transformer.lora_alpha"] == values["transformer.r"] == 4
            assert values["transformer.use_rslora"] is False
        elif name == "pixart":
            peft = json.loads((file.parent / "adapter_config.json").read_text())
            assert peft["lora_alpha"] == peft["r"] == 4 and not peft["use_rslora"]
        else:
            assert metadata["ss_network_dim"] == "4" and float(metadata["ss_network_alpha"]) == 16


def test_at_scale_1_train_leaves_diffusers_keys_without_an_alpha_to_misread(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors import safe_open

    model = trained(ModelConfig(path=str(folders["sd15"]), lora=LoraConfig(rank=4, targets=("to_q",))))
    save_aligned(model, tmp_path / "lora", "card")
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as handle:
        keys, metadata = list(handle.keys()), handle.metadata()
    assert keys and all(
        k.startswith("unet.") and k.endswith(("lora_A.weight", "lora_B.weight")) for k in keys
    )
    values = json.loads(metadata["lora_adapter_metadata"])
    assert values["unet.lora_alpha"] == values["unet.r"] == 4
