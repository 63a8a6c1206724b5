"""Tiny random pipelines of further families of rectified flow, written as folders that diffusers loads:
`make_flux2(folder)`, `make_chroma(folder)`, `make_sana(folder)`, `make_lumina2(folder)`,
`make_krea2(folder)`, `make_kandinsky5(folder)`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from tests.tiny_pipelines import (
    WIDTH,
    flow_vae,
    flux2_transformer,
    flux2_vae,
    qwen_image_vae,
    qwen_tokenizer,
    qwen_vl_config,
    t5,
    t5_tokenizer,
    text_config,
    tokenizer,
)


def mistral_config(vocabulary: int, image_token: int) -> Mistral3Config:
    """As many layers as the pipeline reads."""
    return Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=image_token,
        spatial_merge_size=1,
    )


MESSAGES = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ message.role }}]{% endfor %}"
)
"""A template in the form of Mistral's, whose messages are lists of parts."""


def make_flux2(folder: Path, seed: int = 0, guided: bool = True) -> Path:
    """Write a random Flux2Pipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        tok.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
        pipeline = Flux2Pipeline(
            transformer=flux2_transformer(guided),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(
                mistral_config(len(tok), tok.convert_tokens_to_ids("[IMG]"))
            ),
            tokenizer=PixtralProcessor(PixtralImageProcessor(), tok, chat_template=MESSAGES),
        )
    pipeline.save_pretrained(folder)
    return folder


def make_chroma(folder: Path, seed: int = 0) -> Path:
    """Write a random ChromaPipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = t5_tokenizer()
        pipeline = ChromaPipeline(
            transformer=ChromaTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                axes_dims_rope=(2, 2, 4),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flow_vae(),
            text_encoder=t5(tok),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters and no merges."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *letters]
    return GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=4096)


def gemma2(tok: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tok),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=8192,
            pad_token_id=tok.pad_token_id,
        )
    )


def make_sana(folder: Path, seed: int = 0) -> Path:
    """Write a random SanaPipeline in ``folder``, its autoencoder of 32 x 32 pixels a latent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = gemma_tokenizer()
        levels: dict[str, Any] = {}
        for side in ("encoder", "decoder"):
            levels |= {
                f"{side}_block_types": ("ResBlock",) * 6,
                f"{side}_block_out_channels": (4, 4, 4, 8, 8, 8),
                f"{side}_layers_per_block": (1,) * 6,
                f"{side}_qkv_multiscales": ((),) * 6,
            }
        pipeline = SanaPipeline(
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=32,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            vae=AutoencoderDC(
                latent_channels=4,
                attention_head_dim=4,
                upsample_block_type="interpolate",
                downsample_block_type="conv",
                scaling_factor=0.41407,
                **levels,
            ),
            text_encoder=gemma2(tok),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_lumina2(folder: Path, seed: int = 0, dynamic: bool = False) -> Path:
    """Write a random Lumina2Pipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = gemma_tokenizer()
        pipeline = Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=16,
                hidden_size=16,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 2, 2),
                axes_lens=(300, 64, 64),
                cap_feat_dim=WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic),
            vae=flow_vae(),
            text_encoder=gemma2(tok),
            tokenizer=tok,
        )
    pipeline.save_pretrained(folder)
    return folder


def qwen3_vl(tok: Qwen2Tokenizer) -> Qwen3VLModel:
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tok),
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_heads": 1,
                "out_hidden_size": WIDTH,
                "deepstack_visual_indexes": [0],
            },
        )
    )


def make_krea2(folder: Path, seed: int = 0, distilled: bool = False) -> Path:
    """Write a random Krea2Pipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = qwen_tokenizer()
        tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "assistant"]})
        pipeline = Krea2Pipeline(
            transformer=Krea2Transformer2DModel(
                in_channels=64,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=8,
                text_hidden_dim=WIDTH,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=WIDTH,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 2, 2),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            vae=qwen_image_vae(),
            text_encoder=qwen3_vl(tok),
            tokenizer=tok,
            text_encoder_select_layers=(1, 3),
            is_distilled=distilled,
        )
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():  # tables that start at zero let nothing through
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
    return folder


def make_kandinsky5(folder: Path, seed: int = 0) -> Path:
    """Write a random Kandinsky5T2IPipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, tok_2 = qwen_tokenizer(), tokenizer()
        tok_2.model_max_length = 77
        tok.add_special_tokens(
            {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]}
        )
        clip = text_config(tok_2)
        clip.max_position_embeddings = 77
        pipeline = Kandinsky5T2IPipeline(
            transformer=Kandinsky5Transformer3DModel(
                in_visual_dim=16,
                out_visual_dim=16,
                in_text_dim=WIDTH,
                in_text_dim2=WIDTH,
                time_dim=16,
                model_dim=16,
                ff_dim=32,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 2, 2),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(qwen_vl_config(tok)),
            tokenizer=Qwen2VLProcessor(
                Qwen2VLImageProcessor(), tok, Qwen2VLVideoProcessor(), chat_template=tok.chat_template
            ),
            text_encoder_2=CLIPTextModel(clip),
            tokenizer_2=tok_2,
        )
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():  # modulations that start at zero let nothing through
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
    return folder
