"""Text encoders that are trained: tokens in place of embeddings, the same conditions, adapters on and off."""

from dataclasses import replace

import pytest
import torch

from diffalign.config.schema import LoraConfig, ModelConfig, TextEncoderConfig, TextLoraConfig
from diffalign.errors import UserError
from diffalign.models.denoisers import AdaptersOff
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy
from diffalign.models.text_encoders import TextConditioned, call_conditioned
from diffalign.models.text_lora import begin_training_text, prepare_text_policy
from tests.models.inputs import conditions, states
from tests.tiny_pipelines import make_sd3, make_sd15, make_sdxl

PROMPTS = ["a red circle", "a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {"sd15": make_sd15(root / "sd15"), "sdxl": make_sdxl(root / "sdxl"), "sd3": make_sd3(root / "sd3")}


def configured(folder, checkpointing=False, **text):
    return ModelConfig(
        path=str(folder),
        lora=LoraConfig(rank=2),
        text_encoder=TextEncoderConfig(TextLoraConfig(**{"rank": 2} | text)),
        gradient_checkpointing=checkpointing,
    )


def prepared(config):
    """(model, policy, reference, text parameters by name)."""
    model = load(config)
    begin_training_text(model, config)
    prepare_policy(model, config)
    joint, parameters = prepare_text_policy(model, config, 0)
    policy = replace(policy_denoiser(model, config), network=joint, call=call_conditioned)
    return model, policy, AdaptersOff(policy, joint), dict(parameters)


@pytest.mark.parametrize(
    ("family", "encoders"),
    [("sd15", ()), ("sdxl", ()), ("sdxl", ("text_encoder",)), ("sdxl", ("text_encoder_2",))],
)
def test_tokens_encode_to_what_the_stock_pipeline_makes(folders, family, encoders):
    config = configured(folders[family], encoders=encoders)
    plain, model = load(config), load(config)
    names = begin_training_text(model, config)
    assert names == (encoders or plain.text_encoders)
    encoders = {name: getattr(model.pipeline, name) for name in names}
    joint = TextConditioned(model.network, encoders, model.family, model.family.call)
    for ours, stock in (
        (model.encode_prompts(PROMPTS), plain.encode_prompts(PROMPTS)),
        (model.negative(2), plain.negative(2)),
    ):
        assert {key for key in ours if key.endswith(".tokens")} == {f"{name}.tokens" for name in names}
        assert all(not value.is_floating_point() for key, value in ours.items() if key.endswith(".tokens"))
        found = joint.conditions(ours)
        assert found.keys() == stock.keys()
        assert all(torch.equal(found[key], stock[key]) for key in stock)
    assert model.fingerprint != plain.fingerprint


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_adapter_has_a_gradient_and_the_reference_passes_them_by(folders, family, checkpointing):
    model, policy, reference, parameters = prepared(configured(folders[family], checkpointing))
    (x_t, t), cond = states(), conditions(model, PROMPTS)
    plain = load(configured(folders[family]))
    stock = plain.denoiser()(x_t, t, conditions(plain, PROMPTS))
    assert torch.equal(policy(x_t, t, cond), reference(x_t, t, cond))
    assert torch.equal(reference(x_t, t, cond), stock)
    with torch.no_grad():
        for parameter in parameters.values():
            assert parameter.dtype == torch.float32
            parameter += 0.1
    policy(x_t, t, cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert (policy(x_t, t, cond) - stock).abs().max() > 1e-4
    assert torch.equal(reference(x_t, t, cond), stock)


def test_checkpointing_changes_no_gradient(folders):
    gradients = []
    for checkpointing in (False, True):
        model, policy, _, parameters = prepared(configured(folders["sdxl"], checkpointing))
        policy(*states(), conditions(model, PROMPTS)).square().mean().backward()
        gradients.append([p.grad for p in parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_layer_that_is_not_read_has_no_adapter(folders):
    """SDXL reads the first encoder's last layer but one, and of the second the projection as well."""
    *_, parameters = prepared(configured(folders["sdxl"]))
    first, second = (
        {name for name in parameters if name.startswith(f"{encoder}.")}
        for encoder in ("text_encoder", "text_encoder_2")
    )
    assert all(".layers.0." in name for name in first) and any(".layers.1." in name for name in second)
    assert len(first) * 2 == len(second) == 4 * 2 * 2


@pytest.mark.parametrize(
    ("family", "text", "words"),
    [
        ("sd3", {}, "text encoders of sd3 are not trained.*allowed: 0"),
        ("sdxl", {"encoders": ("text_encoder_3",)}, "sdxl has no 'text_encoder_3'; allowed: text_encoder,"),
        ("sdxl", {"targets": ("to_q",)}, r"model\.text_encoder\.lora\.targets: to_q matches no"),
    ],
)
def test_what_cannot_be_trained_is_refused(folders, family, text, words):
    with pytest.raises(UserError, match=words):
        prepared(configured(folders[family], **text))


def test_an_encoder_that_takes_a_mask_is_refused(folders):
    config = configured(folders["sd15"])
    model = load(config)
    model.pipeline.text_encoder.config.use_attention_mask = True
    with pytest.raises(UserError, match="takes an attention mask"):
        begin_training_text(model, config)
