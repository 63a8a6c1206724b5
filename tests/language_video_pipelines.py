"""Tiny video pipelines with language models, random weights, of the real classes: `make_ltx2(folder)`,
`make_hunyuan_video15(folder)`.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import (
    ByT5Tokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLTextModel,
)

from tests.flow_pipelines import gemma_tokenizer
from tests.tiny_pipelines import WIDTH, qwen_tokenizer, qwen_vl_config, t5


def gemma3(vocabulary: int) -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": vocabulary,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 2048,
            },
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=1,
        )
    )


def make_ltx2(folder: Path, seed: int = 0) -> Path:
    """Write a random LTX2Pipeline of 2.0's form to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = gemma_tokenizer()
        autoencoder = AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
        autoencoder.latents_mean.normal_()
        autoencoder.latents_std.uniform_(0.5, 2.0)
        sound = AutoencoderKLLTX2Audio(
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            mid_block_add_attention=False,
            mel_bins=8,
        )
        pipeline = LTX2Pipeline(
            transformer=LTX2VideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                audio_in_channels=4,
                audio_out_channels=4,
                audio_num_attention_heads=2,
                audio_attention_head_dim=4,
                audio_cross_attention_dim=8,
                num_layers=2,
                caption_channels=WIDTH,
                rope_type="split",
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
            audio_vae=sound,
            text_encoder=gemma3(len(tok)),
            tokenizer=tok,
            connectors=LTX2TextConnectors(
                caption_channels=WIDTH,
                text_proj_in_factor=3,
                video_connector_num_attention_heads=2,
                video_connector_attention_head_dim=8,
                video_connector_num_layers=1,
                video_connector_num_learnable_registers=4,
                audio_connector_num_attention_heads=2,
                audio_connector_attention_head_dim=8,
                audio_connector_num_layers=1,
                audio_connector_num_learnable_registers=4,
                rope_type="split",
            ),
            vocoder=LTX2Vocoder(
                in_channels=sound.config.output_channels * sound.config.mel_bins,
                hidden_channels=8,
                out_channels=2,
                upsample_kernel_sizes=[4, 4],
                upsample_factors=[2, 2],
                resnet_kernel_sizes=[3],
                resnet_dilations=[[1, 3, 5]],
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def make_hunyuan_video15(folder: Path, seed: int = 0) -> Path:
    """Write a random HunyuanVideo15Pipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, glyphs = qwen_tokenizer(), ByT5Tokenizer()
        config = qwen_vl_config(tok).text_config
        config.num_hidden_layers = 3  # the pipeline reads the last but two
        config.layer_types = ["full_attention"] * 3
        pipeline = HunyuanVideo15Pipeline(
            transformer=HunyuanVideo15Transformer3DModel(
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_refiner_layers=1,
                mlp_ratio=2.0,
                text_embed_dim=WIDTH,
                text_embed_2_dim=2 * WIDTH,
                image_embed_dim=8,
                rope_axes_dim=(2, 2, 4),
                target_size=16,
                task_type="t2v",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=AutoencoderKLHunyuanVideo15(
                latent_channels=4,
                block_out_channels=(32, 32, 32, 32, 32),
                layers_per_block=1,
            ),
            text_encoder=Qwen2_5_VLTextModel(config),
            tokenizer=tok,
            text_encoder_2=t5(glyphs),
            tokenizer_2=glyphs,
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
    pipeline.save_pretrained(folder)
    return folder
