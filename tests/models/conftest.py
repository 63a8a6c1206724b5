import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffalign.config.schema import ModelConfig
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.precision import only_errors
from tests.flow_pipelines import (
    make_chroma,
    make_flux2,
    make_kandinsky5,
    make_krea2,
    make_lumina2,
    make_sana,
)
from tests.kolors_pipeline import make_kolors
from tests.tiny_pipelines import (
    make_flux,
    make_flux2_klein,
    make_flux_kontext,
    make_pixart,
    make_pixart_alpha,
    make_qwen_image,
    make_sd3,
    make_sd15,
    make_sdxl,
    make_z_image,
)
from tests.video_pipelines import CASES

MAKERS = {
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "sd3": make_sd3,
    "flux": make_flux,
    "flux_kontext": make_flux_kontext,
    "pixart": make_pixart,
    "pixart_alpha": make_pixart_alpha,
    "z_image": make_z_image,
    "flux2_klein": make_flux2_klein,
    "qwen_image": make_qwen_image,
    "flux2": make_flux2,
    "chroma": make_chroma,
    "sana": make_sana,
    "lumina2": make_lumina2,
    "krea2": make_krea2,
    "kandinsky5": make_kandinsky5,
    "kolors": make_kolors,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a tiny random pipeline folder of each family."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a tiny random pipeline folder of each form of the video families."""
    root = tmp_path_factory.mktemp("video_pipelines")
    with only_errors("diffusers"):
        return {name: make(root / name) for name, (make, _) in CASES.items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the network, whoever imported the hub library first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    return load(ModelConfig(path=str(folders[request.param])))


@pytest.fixture
def sdxl(folders: dict[str, Path]) -> LoadedModel:
    return load(ModelConfig(path=str(folders["sdxl"])))
