"""Tiny pipelines of the real classes with random weights, written as folders that diffusers loads.

For tests that need the right code paths and not a good model: `make_sdxl(folder)`, `make_sd15(folder)`,
`make_sd3(folder)`, `make_flux(folder)`, `make_flux_kontext(folder)`, `make_pixart(folder)`,
`make_pixart_alpha(folder)`, `make_z_image(folder)`, `make_flux2_klein(folder)`, `make_qwen_image(folder)`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Bytes and a few merges: any text can be encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("a", "</w>")][:2]
    names = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        model_max_length=TOKENS,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
    )


def text_config(tok: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def vae(**changes: Any) -> AutoencoderKL:
    """Eight times smaller latents of 4 channels, as the real ones."""
    values: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**(values | changes))


def unet(**changes: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(values | changes))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_sd15(folder: Path, seed: int = 0) -> Path:
    """Write a random StableDiffusionPipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok)),
            tokenizer=tok,
            unet=unet(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a random StableDiffusionXLPipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, tok_2 = tokenizer(), tokenizer(pad="!")
        pipeline = StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config(tok)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tok_2)),
            tokenizer=tok,
            tokenizer_2=tok_2,
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + WIDTH,
            ),
            scheduler=scheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5Tokenizer:
    """Letters, each with and without a space before it."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -2.0) for letter in letters for piece in (letter, f"▁{letter}")]
    return T5Tokenizer(vocab=[*specials, ("▁", -2.0), *pieces], extra_ids=0, model_max_length=512)


def t5(tok: T5Tokenizer, width: int = 2 * WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tok),
            d_model=width,
            d_ff=width,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def flow_vae() -> AutoencoderKL:
    """16 channels, moved and scaled, as SD3's and FLUX's."""
    return vae(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_sd3(folder: Path, seed: int = 0, t5_too: bool = True, dynamic: bool = True, **changes: Any) -> Path:
    """Write a random StableDiffusion3Pipeline to ``folder``, with 3.5's norms and second attentions."""
    values: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, tok_2, tok_3 = tokenizer(), tokenizer(pad="!"), t5_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**(values | changes)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
            vae=flow_vae(),
            text_encoder=CLIPTextModelWithProjection(text_config(tok)),
            tokenizer=tok,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tok_2)),
            tokenizer_2=tok_2,
            text_encoder_3=t5(tok_3) if t5_too else None,
            tokenizer_3=tok_3 if t5_too else None,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_flux(folder: Path, seed: int = 0, guided: bool = True) -> Path:
    """Write a random FluxPipeline to ``folder``: dev, or schnell if it is not ``guided``."""
    return _flux(folder, seed, guided, FluxPipeline)


def make_flux_kontext(folder: Path, seed: int = 0) -> Path:
    """Write a random FluxKontextPipeline to ``folder``."""
    return _flux(folder, seed, True, FluxKontextPipeline)


def _flux(folder: Path, seed: int, guided: bool, pipeline_class: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, tok_2 = tokenizer(), t5_tokenizer()
        pipeline = pipeline_class(
            transformer=FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guided,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guided else 1.0, use_dynamic_shifting=guided
            ),
            vae=flow_vae(),
            text_encoder=CLIPTextModel(text_config(tok)),
            tokenizer=tok,
            text_encoder_2=t5(tok_2),
            tokenizer_2=tok_2,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_pixart(folder: Path, seed: int = 0) -> Path:
    """Write a random PixArtSigmaPipeline to ``folder``."""
    return _pixart(folder, seed, PixArtSigmaPipeline, False)


def make_pixart_alpha(folder: Path, seed: int = 0) -> Path:
    """Write a random PixArtAlphaPipeline to ``folder`` whose network takes sizes, as that of 1024 pixels."""
    return _pixart(folder, seed, PixArtAlphaPipeline, True)


def _pixart(folder: Path, seed: int, pipeline_class: Any, size_conditions: bool) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        pipeline = pipeline_class(
            transformer=PixArtTransformer2DModel(
                sample_size=128 if size_conditions else 32,  # alpha's pipeline tells sizes to one of 128
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=3,
                cross_attention_dim=24,
                caption_channels=2 * WIDTH,
                use_additional_conditions=size_conditions,
            ),
            scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
            vae=vae(scaling_factor=0.13025),
            text_encoder=t5(tok),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""A template in the form of Qwen3's."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes and no merges, with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate([*letters, "<|endoftext|>"])},
        merges=[],
        model_max_length=512,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tok.chat_template = CHAT
    return tok


def qwen3_config(tok: Qwen2Tokenizer, layers: int = 3) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=tok.pad_token_id,
        tie_word_embeddings=True,
    )


def make_z_image(folder: Path, seed: int = 0) -> Path:
    """Write a random ZImagePipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        pipeline = ZImagePipeline(
            transformer=ZImageTransformer2DModel(
                in_channels=16,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 2, 2],
                axes_lens=[1024, 64, 64],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(),
            text_encoder=Qwen3Model(qwen3_config(tok)),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


def flux2_vae() -> AutoencoderKLFlux2:
    """Its latents need normalising."""
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return autoencoder


def flux2_transformer(guided: bool) -> Flux2Transformer2DModel:
    """Return the network of FLUX.2 and, unguided, of klein."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guided,
    )


def make_flux2_klein(folder: Path, seed: int = 0) -> Path:
    """Write a random Flux2KleinPipeline in ``folder``, whose latents need normalising."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        pipeline = Flux2KleinPipeline(
            transformer=flux2_transformer(guided=False),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=Qwen3ForCausalLM(qwen3_config(tok, layers=28)),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


def qwen_image_transformer() -> QwenImageTransformer2DModel:
    """Return the network of Qwen-Image and of its edits."""
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )


def qwen_vl_config(tok: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )


def qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def make_qwen_image_edit(folder: Path, seed: int = 0) -> Path:
    """Write a random QwenImageEditPlusPipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *VISION]})
        config = qwen_vl_config(tok)
        start, image, end, video = tok.convert_tokens_to_ids(list(VISION))
        config.vision_start_token_id, config.image_token_id = start, image
        config.vision_end_token_id, config.video_token_id = end, video
        pipeline = QwenImageEditPlusPipeline(
            transformer=qwen_image_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=qwen_image_vae(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tok,
            processor=Qwen2VLProcessor(
                image_processor=Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=384**2),
                tokenizer=tok,
                video_processor=Qwen2VLVideoProcessor(),
                chat_template=CHAT,
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def make_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Write a random QwenImagePipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        pipeline = QwenImagePipeline(
            transformer=qwen_image_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=qwen_image_vae(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(qwen_vl_config(tok)),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder
