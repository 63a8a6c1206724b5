"""Edit pairs through a whole run: trained with their sources, saved, and loaded by plain diffusers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
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
    ValidationConfig,
)
from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import load_trainable_state, prepare_policy
from diffalign.runs.align import align
from diffalign.tiny.edits import rows
from tests.models.test_sources import TAKING, conditions, noise_of, picture


@pytest.fixture(scope="session")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten edit pairs of drawn scenes as json lines, their pictures beside them."""
    folder = tmp_path_factory.mktemp("edits")
    lines = []
    for number, row in enumerate(rows(10)):
        for name in ("source", "chosen", "rejected"):
            (folder / f"{number}-{name}.png").write_bytes(row[name])
        files = {name: f"{number}-{name}.png" for name in ("source", "chosen", "rejected")}
        lines.append(json.dumps({"prompt": row["prompt"], **files}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def run_of(model: ModelConfig, edits: Path, output: Path, **method: Any) -> Run:
    return Run(
        output=str(output),
        method={"type": "dpo", "beta": 100, **method},
        model=model,
        data=DataConfig(path=str(edits / "pairs.jsonl"), resolution=64, holdout=0.2, flip=True),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(steps=2, batch_size=2),
        logging=LoggingConfig(every=1, trackers=(), diagnostics_bins=1),
        checkpoint=CheckpointConfig(every=2),
    )


def prediction(model: LoadedModel, network: Any, seed: int = 0) -> Tensor:
    told = model.path.model_time(torch.tensor([0.7]))
    with torch.no_grad():
        cond = conditions(model, picture(seed))
        return model.family.call(network.eval(), noise_of(model), told, cond)


@pytest.mark.parametrize("name", TAKING)
def test_a_model_trained_on_edits_is_loaded_by_plain_diffusers(
    folders: dict[str, Path], edits: Path, tmp_path: Path, name: str
) -> None:
    config = ModelConfig(path=str(folders[name]), lora=LoraConfig(rank=2))
    drawn = ValidationConfig(every=2, prompts=(str(edits / "pairs.jsonl"),), sampling_steps=2, guidance=1.0)
    result = align(replace(run_of(config, edits, tmp_path / "run"), validation=drawn), lambda line: None)
    assert result.aligned is not None
    assert len(list((result.output / "samples" / "step-000002").glob("*.png"))) == 10
    model = load(config)
    base = prediction(model, model.network)
    prepare_policy(model, config)
    state = load_file(result.output / "checkpoints" / "step-2" / "trainable.safetensors")
    load_trainable_state(model, state)
    expected = prediction(model, model.network)
    assert float((expected - base).abs().max()) > 1e-4
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.load_lora_weights(result.aligned)
    assert_close(prediction(model, pipeline.transformer), expected, rtol=0, atol=1e-5)
    assert float((prediction(model, pipeline.transformer, seed=1) - expected).abs().max()) > 1e-4


def test_a_family_without_sources_refuses_edits_before_it_trains(
    folders: dict[str, Path], edits: Path, tmp_path: Path
) -> None:
    config = ModelConfig(path=str(folders["sd3"]), lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"pairs\.jsonl line 1: the row has a source image.*takes none"):
        align(run_of(config, edits, tmp_path / "run"), lambda line: None)
