"""A tiny random Qwen3-VL in the published layout, and its processor."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.rewards import tiny_qwen
from tests.rewards.tiny_qwen import WIDTH, make_tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# of the published preprocessor_config.json
PIXELS = {"patch_size": 16, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_base(folder: Path) -> Path:
    """config.json as the hub has it (nested), and the tokenizer."""
    words = make_tokenizer(folder)
    ids = {f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "tie_word_embeddings": False, **ids,
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": len(words) + 20, "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096, "rope_theta": 5e6, "bos_token_id": 0, "eos_token_id": 0,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 2, "hidden_size": WIDTH, "num_heads": 2,
            "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "patch_size": 16, "in_channels": 3,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


random_model = partial(tiny_qwen.random_model, kind=Qwen3VLForConditionalGeneration)


def image_processor() -> Any:
    """Return transformers' processor on PIL, of the published preprocessor_config.json."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 65536, "longest_edge": 16777216}, **PIXELS)


def save_processor(folder: Path, most: int = 128 * 128) -> Any:
    """Write and return a processor of images of at most ``most`` pixels, with the tokenizer of ``folder``."""
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 64 * 64, "longest_edge": most}, **PIXELS)
    processor = Qwen3VLProcessor(
        pictures, make_tokenizer(folder), Qwen3VLVideoProcessor(), chat_template=CHAT
    )
    processor.save_pretrained(folder)
    return processor
