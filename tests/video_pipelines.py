"""Tiny video pipelines of the real classes with random weights, written as folders that diffusers loads:
`make_wan(folder)`, `make_cogvideox(folder)`, `make_ltx(folder)`, `make_text_to_video(folder)`,
`make_animatediff(folder)`, and `make_motion_adapter(folder)` for the tiny SD 1.5 of `tiny_pipelines`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.language_video_pipelines import make_hunyuan_video15, make_ltx2
from tests.tiny_pipelines import WIDTH, scheduler, t5, t5_tokenizer, text_config, tokenizer, unet, vae


def _saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    values: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 2 * WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**(values | changes))


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    values: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**(values | changes))


def make_wan(folder: Path, seed: int = 0, two_experts: bool = False) -> Path:
    """Write a random WanPipeline of 2.1's form to ``folder``, or of A14B's with its two experts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        pipeline = WanPipeline(
            transformer=wan_transformer(),
            transformer_2=wan_transformer() if two_experts else None,
            boundary_ratio=0.875 if two_experts else None,
            scheduler=wan_scheduler(),
            vae=wan_vae(),
            text_encoder=umt5(len(tok)),
            tokenizer=tok,
        )
    return _saved(pipeline, folder)


def make_wan_a14b(folder: Path, seed: int = 0) -> Path:
    """Write a random WanPipeline of 2.2's A14B form."""
    return make_wan(folder, seed, two_experts=True)


def make_wan_i2v(folder: Path, seed: int = 0, a14b: bool = False) -> Path:
    """Write a random WanImageToVideoPipeline of 2.1's form, with a vision tower, or of A14B's two experts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, seen = t5_tokenizer(), {"in_channels": 36}
        tower = None if a14b else CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
                image_size=16, patch_size=8,
            )
        )  # fmt: skip
        if not a14b:
            seen |= {"image_dim": WIDTH, "added_kv_proj_dim": 24}
        size = {"height": 16, "width": 16}
        pipeline = WanImageToVideoPipeline(
            transformer=wan_transformer(**seen),
            transformer_2=wan_transformer(**seen) if a14b else None,
            boundary_ratio=0.9 if a14b else None,
            scheduler=wan_scheduler(),
            vae=wan_vae(),
            text_encoder=umt5(len(tok)),
            tokenizer=tok,
            image_encoder=tower,
            image_processor=None if a14b else CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        )
    return _saved(pipeline, folder)


def make_wan_ti2v(folder: Path, seed: int = 0) -> Path:
    """Write a random WanPipeline of 2.2's 5B form: 16 x 16 pixels a latent, a time for each token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        pipeline = WanPipeline(
            transformer=wan_transformer(in_channels=6, out_channels=6),
            expand_timesteps=True,
            scheduler=wan_scheduler(),
            vae=wan_vae(
                z_dim=6,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
                latents_mean=(0.1, -0.2, 0.3, 0.0, 0.5, -0.6),
                latents_std=(1.0, 2.0, 0.5, 1.5, 0.8, 1.2),
            ),
            text_encoder=umt5(len(tok)),
            tokenizer=tok,
        )
    return _saved(pipeline, folder)


def umt5(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=2 * WIDTH,
            d_ff=2 * WIDTH,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def make_cogvideox(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random CogVideoXPipeline of the 2b's form to ``folder``; ``changes`` are of its transformer."""
    values: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 2 * WIDTH,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 226,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        pipeline = CogVideoXPipeline(
            transformer=CogVideoXTransformer3DModel(**(values | changes)),
            scheduler=CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0,
                timestep_spacing="trailing",
                clip_sample=False,
            ),
            vae=AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * 4,
                up_block_types=("CogVideoXUpBlock3D",) * 4,
                block_out_channels=(8, 8, 8, 8),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                temporal_compression_ratio=4,
            ),
            text_encoder=t5(tok),
            tokenizer=tok,
        )
    return _saved(pipeline, folder)


def make_cogvideox_5b(folder: Path, seed: int = 0) -> Path:
    """Write the same with rotary positions, as the 5b."""
    return make_cogvideox(folder, seed, use_rotary_positional_embeddings=True)


def make_cogvideox_15(folder: Path, seed: int = 0) -> Path:
    """Write the same with patches two latent frames deep, as 1.5."""
    deep = {"patch_size_t": 2, "patch_bias": False, "sample_frames": 13}
    return make_cogvideox(folder, seed, use_rotary_positional_embeddings=True, **deep)


def make_ltx(folder: Path, seed: int = 0, timed_decoder: bool = False) -> Path:
    """Write a random LTXPipeline, its decoder of 0.9 or of 0.9.1 and later, which takes a time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        autoencoder = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            timestep_conditioning=timed_decoder,
        )
        autoencoder.latents_mean.normal_()
        autoencoder.latents_std.uniform_(0.5, 2.0)
        pipeline = LTXPipeline(
            transformer=LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                num_layers=2,
                caption_channels=2 * WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                shift_terminal=0.1,
            ),
            vae=autoencoder,
            text_encoder=t5(tok),
            tokenizer=tok,
        )
    return _saved(pipeline, folder)


def make_text_to_video(folder: Path, seed: int = 0) -> Path:
    """Write a random TextToVideoSDPipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = tokenizer()
        pipeline = TextToVideoSDPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok)),
            tokenizer=tok,
            unet=UNet3DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
            scheduler=scheduler(),
        )
    return _saved(pipeline, folder)


def motion_adapter() -> MotionAdapter:
    """One that fits the tiny SD 1.5; its last layers are random, which a fresh one's are not."""
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapter


def make_motion_adapter(folder: Path, seed: int = 0) -> Path:
    """Write a random MotionAdapter to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        motion_adapter().save_pretrained(folder)
    return folder


def make_animatediff(folder: Path, seed: int = 0) -> Path:
    """Write a random AnimateDiffPipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = tokenizer()
        pipeline = AnimateDiffPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok)),
            tokenizer=tok,
            unet=unet(),
            motion_adapter=motion_adapter(),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        )
    return _saved(pipeline, folder)


CASES: dict[str, tuple[Callable[[Path], Path], tuple[int, int, int]]] = {
    "wan": (make_wan, (32, 48, 5)),
    "wan_ti2v": (make_wan_ti2v, (32, 64, 5)),
    "wan_a14b": (make_wan_a14b, (32, 48, 5)),
    "cogvideox": (make_cogvideox, (64, 96, 9)),
    "cogvideox_5b": (make_cogvideox_5b, (64, 48, 9)),
    "cogvideox_15": (make_cogvideox_15, (64, 48, 9)),
    "ltx": (make_ltx, (64, 96, 9)),
    "ltx2": (make_ltx2, (64, 96, 9)),
    "hunyuan_video15": (make_hunyuan_video15, (64, 96, 5)),
    "text_to_video": (make_text_to_video, (64, 80, 3)),
    "animatediff": (make_animatediff, (64, 80, 3)),
}
"""Of each form of a family: who makes it, and (height, width, frames) of a video."""
