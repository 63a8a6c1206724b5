"""VQAScore (Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv
2404.01291) with any vision-language model of transformers: the probability that it answers "Yes" to whether
the image shows the prompt.

The model's own processor cuts the image and its own chat template asks: images by its PIL version, pixels
given as a tensor by its torch version, which is differentiable but does not clamp what bicubic overshoots. A
tokenizer may write the answer with a space before it or in several tokens, so the answer is written where it
would stand, and its tokens' probabilities are multiplied.
"""

import inspect
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import check_whole, unloadable
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved

_NAME = "vqascore"
_QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
_ANSWER = "Yes"


@dataclass(frozen=True)
class VQAScore:
    """A frozen vision-language model, its processor, and how its answer is written.

    Attributes:
        model: of AutoModelForImageTextToText.
        processor: its own, of PIL images, padding on the right: there no token of a causal model looks, and
            positions are those of the text alone.
        soft: the same of pixels, in torch; None if the model has no such processor, and then pixels are
            rounded to 8 bits, as saving them would, and have no gradient.
        answer: what follows a question, with the space that the chat template leaves to it.
        tokens: the answer's, at least one.
        batch_size: images at once.
    """

    model: Any
    processor: Any
    soft: Any
    answer: str
    tokens: tuple[int, ...]
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """(B,) float32 in [0, 1]; PIL images take the exact path, pixels (B, 3, H, W) the differentiable one.

        Raises:
            UserError: an empty prompt, or one that holds a token of the model's format.
        """
        refuse_unreadable(_NAME, prompts, reserved(self.processor.tokenizer))
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        texts = [chat_text(self.processor, prompt) + self.answer for prompt in prompts]
        bos = self.processor.tokenizer.bos_token
        how = {
            "padding": True,
            "return_tensors": "pt",
            "add_special_tokens": bos is None or not texts[0].startswith(bos),  # some templates have it
        }
        if isinstance(images, Tensor) and self.soft is not None:
            pictures = [[picture] for picture in images.float().to(self.model.device)]
            inputs = self.soft(text=texts, images=pictures, do_rescale=False, **how)
        else:
            inputs = self.processor(text=texts, images=[[image] for image in to_pil(images)], **how)
        inputs = inputs.to(self.model.device, self.model.dtype)
        positions = torch.arange(inputs.input_ids.shape[1], device=self.model.device)
        last = (inputs.attention_mask * positions).argmax(1)
        where = last[:, None] + torch.arange(1 - len(self.tokens), 1, device=last.device)
        answers = inputs.input_ids.gather(1, where)
        if not (answers == torch.tensor(self.tokens, device=last.device)).all():
            raise UserError(
                f"reward {_NAME!r}: the processor of this model writes something after {self.answer!r}, so "
                "its probability cannot be read; take another model"
            )
        scores = self._logits(inputs, where - 1).float().log_softmax(-1)
        return scores.gather(2, answers[..., None])[..., 0].sum(1).exp()

    def _logits(self, inputs: Any, where: Tensor) -> Float[Tensor, "B K V"]:
        """Return what the model says at positions (B, K); no others are computed where it can leave
        them out.
        """
        rows = torch.arange(len(where), device=where.device)[:, None]
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return self.model(**inputs).logits[rows, where]
        kept, at = where.unique(return_inverse=True)
        return self.model(**inputs, logits_to_keep=kept).logits[rows, at]


def chat_text(processor: Any, prompt: str) -> str:
    """Return the question about an image as the model's chat template puts it, ready for the answer."""
    question = {"type": "text", "text": _QUESTION.format(prompt)}
    message = {"role": "user", "content": [{"type": "image"}, question]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def load(source: str | None, place: Place) -> VQAScore:
    """Any vision-language model of transformers, from a folder or the hub; without a source the card's.

    Raises:
        UserError: nothing there, the hub cannot be reached, or a model that gives no such answers.
    """
    from transformers import AutoModelForImageTextToText

    source = source or REGISTRY[_NAME].checkpoint
    # Whatever the libraries raise for an absent, unreachable or other model is for the user to mend.
    try:
        processor, soft = _processors(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, place.dtype), output_loading_info=True
        )
    except Exception as error:
        raise unloadable(_NAME, f"the vision-language model of {source!r}", error, "instead") from error
    model, loading = loaded
    check_whole(_NAME, source, "vision-language model", loading)
    if model.config.is_encoder_decoder:
        raise UserError(f"reward {_NAME!r}: {source!r} encodes and decodes; needed is a causal model")
    answer, tokens = _answer(processor, source)
    model = model.to(place.device).eval().requires_grad_(False)
    return VQAScore(model, processor, soft, answer, tokens, place.batch_size)


def _processors(source: str) -> tuple[Any, Any]:
    """Return the model's processor of PIL images, and that of pixels if there is one."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(source)
    processor.tokenizer.padding_side = "right"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    soft = copy(processor)
    processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    try:
        soft.image_processor = AutoImageProcessor.from_pretrained(source, backend="torchvision")
    except (ImportError, ValueError):
        return processor, None
    return processor, soft


def _answer(processor: Any, source: str) -> tuple[str, tuple[int, ...]]:
    """How "Yes" is written after a question, and its tokens."""
    try:
        question = chat_text(processor, "a")
    except Exception as error:  # no template, or one of another kind: each raises its own
        raise unloadable(_NAME, f"the chat template of {source!r}", error, "instead") from error
    words = processor.tokenizer
    before = words(question, add_special_tokens=False).input_ids
    ends_in_format = bool(before) and words.convert_ids_to_tokens(before[-1]) in reserved(words)
    answer = _ANSWER if ends_in_format or question[-1:].isspace() else f" {_ANSWER}"
    after = words(question + answer, add_special_tokens=False).input_ids
    tokens = tuple(after[len(before) :])
    if after[: len(before)] != before or not tokens or words.decode(tokens).strip() != _ANSWER:
        raise UserError(
            f"reward {_NAME!r}: the tokenizer of {source!r} does not write {answer!r} apart from the question"
        )
    return answer, tokens
