"""Tokenizers of the tiny models: CLIP's byte-level BPE, trained on the captions, and T5's, a token a word."""

import json
import string
from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from diffalign.tiny.worlds import WORLDS
from diffalign.tiny_build.networks import TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def learn(texts: Sequence[str], merges: int = 140) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges learnt on captions; any other text is encoded as bytes."""
    from tokenizers import Regex

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # the limit is above the number of words, so that every word becomes a single token
    trainer = trainers.BpeTrainer(vocab_size=2 * 256 + merges, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learnt = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in learnt), START, END]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}, learnt


def tokenizer(pad: str = END, tokens: int = TOKENS, family: str = "sdxl") -> CLIPTokenizer:
    """Return a CLIPTokenizer for a family's captions; the second one of SDXL and SD3 pads with `!`."""
    vocab, merges = learn(WORLDS[family].vocabulary())
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=tokens,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
    )


def save(tok: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer's folder, including `vocab.json` and `merges.txt` for older versions."""
    tok.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer for captions of moving shapes: one token a word; other text in characters."""
    from diffalign.tiny.motions import split_captions

    return word_tokenizer({word for text in split_captions("train") for word in text.split()})


def word_tokenizer(words: Collection[str]) -> T5Tokenizer:
    """Return a T5 tokenizer with one token for each of `words`; other text is spelt in characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -1.0) for word in sorted(words)]
    known = {piece for piece, _ in pieces}
    spelt = ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    pieces += [(letter, -10.0) for letter in spelt if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
