"""Causal vision-language models of transformers for rewards: loading, and probabilities of what they say.

The model's own chat template and processor make the input: PIL images go through the processor's PIL backend,
tensors through its torch backend, which is differentiable but does not clamp bicubic overshoot.
"""

import inspect
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import check_complete, unloadable
from diffalign.rewards.images import Images, to_pil
from diffalign.rewards.place import Place
from diffalign.rewards.zoo.instructions import reserved


@dataclass(frozen=True)
class Reader:
    """A frozen vision-language model that reads one image and a text a row.

    Attributes:
        name: the reward's name, for messages.
        source: folder or hub id, for messages.
        model: a model of AutoModelForImageTextToText.
        processor: its processor for PIL images. It pads on the right, to which a causal model does not
            attend, so padding does not shift positions.
        soft: its differentiable processor for tensors; None if the model has none. Tensors are then rounded
            to 8 bits and have no gradient.
    """

    name: str
    source: str
    model: Any
    processor: Any
    soft: Any

    def asked(self, question: str) -> str:
        """Return a question about an image in the model's chat template, up to the start of the answer."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text: str = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return text

    def inputs(self, images: Images, texts: Sequence[str]) -> Any:
        """Return the model's inputs of B images and their texts, which the chat template has formatted."""
        options = {
            "text": list(texts),
            "padding": True,
            "return_tensors": "pt",
            "add_special_tokens": adds_special_tokens(self.processor, texts[0]),
        }
        if isinstance(images, Tensor) and self.soft is not None:
            pictures = [[picture] for picture in images.float().to(self.model.device)]
            inputs = self.soft(images=pictures, do_rescale=False, **options)
        else:
            inputs = self.processor(images=[[image] for image in to_pil(images)], **options)
        return inputs.to(self.model.device, self.model.dtype)

    def logits(self, inputs: Any, positions: Int[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        """Return the logits, float32, at some positions; others are not computed if the model allows it."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            found: Tensor = self.model(**inputs).logits[rows, positions]
            return found.float()
        distinct, index = positions.unique(return_inverse=True)
        found = self.model(**inputs, logits_to_keep=distinct).logits[rows, index]
        return found.float()

    def probability(self, images: Images, questions: Sequence[str], answer: "Answer") -> Float[Tensor, " B"]:
        """Return the probability of an answer to each question about its image.

        Raises:
            UserError: the processor writes something after the answer.
        """
        inputs = self.inputs(images, [self.asked(question) + answer.text for question in questions])
        count = len(answer.tokens)
        at = last_positions(inputs)[:, None] + torch.arange(1 - count, 1, device=self.model.device)
        answers = inputs.input_ids.gather(1, at)
        if not (answers == torch.tensor(answer.tokens, device=at.device)).all():
            raise UserError(
                f"reward {self.name!r}: the processor of this model writes something after {answer.text!r}, "
                "so its probability cannot be read; take another model"
            )
        scores = self.logits(inputs, at - 1).log_softmax(-1)
        return scores.gather(2, answers[..., None])[..., 0].sum(1).exp()

    def answer(self, word: str) -> "Answer":
        """Return a word as the start of an answer.

        Raises:
            UserError: the model has no chat template, or its tokenizer does not write the word apart from the
                question.
        """
        question, tokenizer = self.any_question(), self.processor.tokenizer
        before = tokenizer(question, add_special_tokens=False).input_ids
        ends_in_format = bool(before) and tokenizer.convert_ids_to_tokens(before[-1]) in reserved(tokenizer)
        text = word if ends_in_format or question[-1:].isspace() else f" {word}"
        return Answer(text, self.tokens(question, text))

    def any_question(self) -> str:
        """Return some question, as ``asked`` does. UserError for a model without a chat template for it."""
        try:
            return self.asked("a")
        except Exception as error:  # a missing or unsuitable template, of many types
            raise unloadable(self.name, f"the chat template of {self.source!r}", error, "instead") from error

    def tokens(self, before: str, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that follows another.

        Raises:
            UserError: the tokenizer does not write it apart from what is before it.
        """
        tokenizer = self.processor.tokenizer
        first = tokenizer(before, add_special_tokens=False).input_ids
        both = tokenizer(before + text, add_special_tokens=False).input_ids
        tokens = tuple(both[len(first) :])
        if both[: len(first)] != first or not tokens or tokenizer.decode(tokens).strip() != text.strip():
            raise UserError(
                f"reward {self.name!r}: the tokenizer of {self.source!r} does not write {text!r} apart from "
                "the text before it"
            )
        return tokens

    def first_tokens(self, before: str, texts: Sequence[str]) -> tuple[int, ...]:
        """Return the first token of each of some texts that may follow another.

        Raises:
            UserError: two have one first token, or as ``tokens``.
        """
        first = tuple(self.tokens(before, text)[0] for text in texts)
        if len(set(first)) < len(first):
            words = ", ".join(text.strip() for text in texts)
            raise UserError(
                f"reward {self.name!r}: the tokenizer of {self.source!r} begins two of {words} with one "
                "token, so the next token does not tell them apart; take another model"
            )
        return first

    def next_token(self, images: Images, texts: Sequence[str]) -> Float[Tensor, "B V"]:
        """Return the logits, float32, of the token that follows each text about its image."""
        inputs = self.inputs(images, texts)
        return self.logits(inputs, last_positions(inputs)[:, None])[:, 0]


@dataclass(frozen=True)
class Answer:
    """An answer, with a leading space if the chat template leaves it out, and its tokens."""

    text: str
    tokens: tuple[int, ...]


def last_positions(inputs: Any) -> Int[Tensor, " B"]:
    """Return the position of the last token of each row that is no padding."""
    positions = torch.arange(inputs.input_ids.shape[1], device=inputs.input_ids.device)
    last: Tensor = (inputs.attention_mask * positions).argmax(1)
    return last


def reader_of(name: str, source: str, place: Place) -> Reader:
    """Load a vision-language model of a folder or hub id.

    Raises:
        UserError: no such model, the hub cannot be reached, or the model is not causal.
    """
    from transformers import AutoImageProcessor

    processor = processor_of(name, source, "right")
    soft = copy(processor)
    try:
        soft.image_processor = AutoImageProcessor.from_pretrained(source, backend="torchvision")
    except (ImportError, ValueError):
        soft = None
    return Reader(name, source, model_of(name, source, place), processor, soft)


def model_of(name: str, source: str, place: Place) -> Any:
    """Return the frozen model of a folder or hub id, in evaluation mode.

    Raises:
        UserError: nothing there, the hub cannot be reached, weights are missing, or it is no causal model;
            ``name`` is the reward's.
    """
    from transformers import AutoModelForImageTextToText

    # the libraries raise many types for an absent, unreachable or unsuitable model
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, place.dtype), output_loading_info=True
        )
    except Exception as error:
        raise unloadable(name, f"the vision-language model of {source!r}", error, "instead") from error
    model, loading = loaded
    check_complete(name, source, "vision-language model", loading)
    if model.config.is_encoder_decoder:
        raise UserError(f"reward {name!r}: {source!r} encodes and decodes; needed is a causal model")
    return model.to(place.device).eval().requires_grad_(False)


def processor_of(name: str, source: str, side: str) -> Any:
    """Return the model's processor of PIL images, padding on the ``side``.

    Raises:
        UserError: nothing there, or it has no processor of images and texts.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(source)
        processor.tokenizer.padding_side = side
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except Exception as error:
        raise unloadable(name, f"the vision-language model of {source!r}", error, "instead") from error
    return processor


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Return whether a tokenizer must add the special tokens to a text of the chat template: some templates
    have them.
    """
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)
