"""A tiny random Qwen2-VL in the published layouts, and the inputs of transformers' own classes."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffalign.rewards.zoo.instructions import template

FORMAT = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 32


def make_tokenizer(folder: Path, whole: str = "", **kwargs: Any) -> Any:
    """Byte-level, with merges learnt from the instructions, so that these are some hundred tokens; the words
    of ``whole`` are one token each.
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learnt.train_from_iterator(
        [template("hpsv3"), template("video_reward"), *["Yes No"] * 9, *[whole] * 999], trainer
    )
    found = json.loads(learnt.to_str())["model"]
    words = Qwen2Tokenizer(vocab=found["vocab"], merges=[tuple(m) for m in found["merges"]], **kwargs)
    words.add_tokens(FORMAT, special_tokens=True)
    words.save_pretrained(folder)
    return words


def make_base(folder: Path, weights: bool = False, seed: int = 0, whole: str = "") -> Path:
    """config.json as the hub has it (flat), tokenizer, and if wanted model.safetensors in the old layout."""
    words = make_tokenizer(folder, whole)
    config = flat_config(words) | {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2,
            "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        from safetensors.torch import save_file

        save_file(old_layout(random_model(folder, seed=seed)), folder / "model.safetensors", {"format": "pt"})
    return folder


def flat_config(words: Any) -> dict[str, Any]:
    """Return what the config.json of a Qwen2-VL and of a Qwen2.5-VL with that tokenizer have in common."""
    tokens = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {
        f"{name.removesuffix('_pad')}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in tokens
    }
    return {
        "vocab_size": len(words) + 20, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu",
        "max_position_embeddings": 4096, "max_window_layers": 2, "use_sliding_window": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "float32",
        "bos_token_id": 0, "eos_token_id": 0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, **ids,
    }  # fmt: skip


def random_model(
    base: Path,
    tokens: int | None = None,
    seed: int = 0,
    std: float = 0.15,
    kind: Any = Qwen2VLForConditionalGeneration,
) -> Any:
    """Return a model of that config and number of tokens; its weights are large, so that images matter."""
    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = tokens or config.text_config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else std)
            elif "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def make_processor(folder: Path) -> Any:
    """Write the processor of a base with its chat template, and return it."""
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    return processor


@torch.no_grad()
def answering(model: Any, inputs: Any, token: int) -> None:
    """Give the model a head that gives one token a probability of about 1/2 on these inputs."""
    last = model.model(**inputs).last_hidden_state[0, -1]
    rows = model.lm_head.weight
    rows[token] = last / last.square().sum() * torch.tensor(len(rows)).log()


@torch.no_grad()
def quiet(model: Any) -> Any:
    """Return the model with a head that hardly says anything."""
    rows = model.lm_head.weight
    rows.copy_(0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    return model


def old_layout(model: Any) -> dict[str, Tensor]:
    """Names as transformers wrote them before 4.52: `visual.*`, `model.layers.*`, `lm_head.weight`."""
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.clone()
        for key, tensor in model.state_dict().items()
    }


def marked(base: Path, marks: list[str]) -> Any:
    """Return the tokenizer of a base with the reward's tokens, and its chat template."""
    words = AutoTokenizer.from_pretrained(base, chat_template=CHAT)
    words.add_tokens(marks, special_tokens=True)
    return words


def image_processor() -> Any:
    """Return the processor of transformers on PIL, of the published preprocessor_config.json."""
    return Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)


@torch.no_grad()
def hidden_states(model: Any, words: Any, text: str, kind: str, patches: Tensor, grid: Tensor) -> Tensor:
    """(L, D) of one row, as the published code calls the model: embeddings, and positions left to it.

    ``text`` is the user's; ``kind`` is image or video.
    """
    message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}
    whole = words.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    count = int(grid.prod()) // 4
    ids = words(whole.replace(f"<|{kind}_pad|>", f"<|{kind}_pad|>" * count), return_tensors="pt").input_ids
    embedded = model.get_input_embeddings()(ids)
    seen = torch.cat(model.get_image_features(patches, grid).pooler_output)
    embedded[ids == words.convert_tokens_to_ids(f"<|{kind}_pad|>")] = seen
    model.model.rope_deltas = None
    return ids[0], model.model(inputs_embeds=embedded).last_hidden_state[0]
