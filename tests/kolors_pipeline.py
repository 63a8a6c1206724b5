"""A tiny random KolorsPipeline of the real classes: `make_kolors(folder)`."""

from pathlib import Path

import sentencepiece
import torch
from diffusers import DDIMScheduler, KolorsPipeline
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

from tests.tiny_pipelines import WIDTH, unet, vae


def glm_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Write a sentencepiece model of letters to ``folder`` and return the tokenizer that reads it."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters), "".join(letters)] * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=len(letters) + 4,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"), model_max_length=256)


def chat_glm(vocabulary: int) -> ChatGLMModel:
    return ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=vocabulary,
            hidden_size=WIDTH,
            ffn_hidden_size=WIDTH,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=512,
            multi_query_attention=True,
            multi_query_group_num=1,
            rmsnorm=True,
            add_bias_linear=False,
            add_qkv_bias=True,
            original_rope=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )


def make_kolors(folder: Path, seed: int = 0) -> Path:
    """Write a random KolorsPipeline to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = glm_tokenizer(folder / "tokenizer")
        encoder = chat_glm(len(tok) + 8)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # which its class leaves as memory was
        pipeline = KolorsPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=encoder,
            tokenizer=tok,
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + WIDTH,
                encoder_hid_dim=WIDTH,
                encoder_hid_dim_type="text_proj",
            ),
            scheduler=DDIMScheduler(
                num_train_timesteps=1100,
                beta_start=0.00085,
                beta_end=0.014,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        )
    pipeline.save_pretrained(folder)
    return folder
