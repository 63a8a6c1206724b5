"""Each family through a whole run: trained, saved, and loaded by plain diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
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
from diffalign.export.aligned import load_aligned, save_merged
from diffalign.models.loading import load
from diffalign.models.lora import has_lora_loader, load_trainable_state, prepare_policy
from diffalign.runs.align import align
from tests.models.inputs import conditions, states_of

TRAINED = (
    "sd3", "flux", "pixart", "pixart_alpha", "z_image", "flux2_klein", "qwen_image", "flux2", "chroma",
    "sana", "lumina2", "krea2", "kandinsky5", "kolors",
)  # fmt: skip
TARGETS = {"kandinsky5": ("to_query", "to_key", "to_value", "self_attention.out_layer")}


def prediction(model: Any, network: nn.Module) -> Tensor:
    x_t, t = states_of(model)
    with torch.no_grad():
        told = model.path.model_time(t)
        return model.family.call(network.eval(), x_t, told, conditions(model, ["a red circle", "two"]))


def plainly(config: ModelConfig, aligned: Path, network: str, by_peft: bool) -> nn.Module:
    """Return the network that a user without diffalign loads."""
    if config.train == "full":
        return getattr(DiffusionPipeline.from_pretrained(aligned), network)
    pipeline = DiffusionPipeline.from_pretrained(config.path)
    if by_peft:
        return PeftModel.from_pretrained(getattr(pipeline, network), aligned).base_model.model
    pipeline.load_lora_weights(aligned)
    return getattr(pipeline, network)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_family_is_loaded_by_plain_diffusers(
    folders: dict[str, Path], tmp_path: Path, name: str, train: Any
) -> None:
    # a scale of 4: folding it into the factors is exact
    lora = LoraConfig(rank=2, alpha=8.0, targets=TARGETS.get(name, LoraConfig().targets))
    config = ModelConfig(path=str(folders[name]), train=train, lora=lora, gradient_checkpointing=True)
    run = Run(
        output=str(tmp_path / "run"),
        method={"type": "dpo", "beta": 100},
        model=config,
        data=DataConfig(path="tiny:pairs", resolution=32, limit=10, holdout=0.2, cache_batch_size=10),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(steps=2, batch_size=2),
        logging=LoggingConfig(every=1, trackers=(), diagnostics_bins=1),
        checkpoint=CheckpointConfig(every=2),
    )
    result = align(run, lambda line: None)
    assert result.aligned is not None
    model = load(config)
    base = prediction(model, model.network)
    prepare_policy(model, config)
    load_trainable_state(model, load_file(result.output / "checkpoints" / "step-2" / "trainable.safetensors"))
    expected = prediction(model, model.network)
    assert float((expected - base).abs().max()) > 1e-3
    by_peft = not has_lora_loader(model.family)
    assert by_peft == name.startswith("pixart")
    network = plainly(config, result.aligned, model.family.network_name, by_peft)
    assert_close(prediction(model, network), expected, rtol=0, atol=1e-5)
    again = load_aligned(config, result.aligned)
    assert_close(prediction(model, getattr(again, model.family.network_name)), expected, rtol=0, atol=1e-5)
    card = (result.aligned / "README.md").read_text()
    assert (("PeftModel" if by_peft else "load_lora_weights") in card) == (train == "lora")
    if train == "lora":
        save_merged(config, result.aligned, tmp_path / "merged", "")
        merged = load(ModelConfig(path=str(tmp_path / "merged")))
        assert not [key for key, _ in merged.network.named_parameters() if "lora" in key]
        assert torch.allclose(prediction(model, merged.network), expected, atol=1e-4, rtol=1e-4)
