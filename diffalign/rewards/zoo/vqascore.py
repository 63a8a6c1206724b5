"""VQAScore: the probability that a vision-language model answers "Yes" to whether the image shows the prompt.

Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291, with any
vision-language model of transformers. The model's own chat template and processor make the input: PIL images
go through the processor's PIL backend, tensors through its torch backend, which is differentiable but does
not clamp bicubic overshoot. A tokenizer may write the answer with a leading space or as several tokens, so
the answer is appended to the text, and the probabilities of its tokens are multiplied.
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
from diffalign.rewards.checkpoints import unloadable
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved
from diffalign.rewards.zoo.vision_language import adds_special_tokens, model_of, processor_of

_NAME = "vqascore"
_QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
_ANSWER = "Yes"


@dataclass(frozen=True)
class VQAScore:
    """A frozen vision-language model, its processors, and the tokens of its answer.

    Attributes:
        model: a model of AutoModelForImageTextToText.
        processor: its processor for PIL images. It pads on the right, to which a causal model does not
            attend, so padding does not shift positions.
        soft: its differentiable processor for tensors; None if the model has none. Tensors are then rounded
            to 8 bits and have no gradient.
        answer: the text of the answer, with a leading space if the chat template leaves it out.
        tokens: token ids of the answer, at least one.
        batch_size: images a forward pass.
    """

    model: Any
    processor: Any
    soft: Any
    answer: str
    tokens: tuple[int, ...]
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) in [0, 1], float32; tensors (B, 3, H, W) take the differentiable path.

        Raises:
            UserError: an empty prompt, or one that holds a special token of the model.
        """
        refuse_unreadable(_NAME, prompts, reserved(self.processor.tokenizer))
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        texts = [chat_text(self.processor, prompt) + self.answer for prompt in prompts]
        options = {
            "padding": True,
            "return_tensors": "pt",
            "add_special_tokens": adds_special_tokens(self.processor, texts[0]),
        }
        if isinstance(images, Tensor) and self.soft is not None:
            pictures = [[picture] for picture in images.float().to(self.model.device)]
            inputs = self.soft(text=texts, images=pictures, do_rescale=False, **options)
        else:
            inputs = self.processor(text=texts, images=[[image] for image in to_pil(images)], **options)
        inputs = inputs.to(self.model.device, self.model.dtype)
        positions = torch.arange(inputs.input_ids.shape[1], device=self.model.device)
        last = (inputs.attention_mask * positions).argmax(1)
        at = last[:, None] + torch.arange(1 - len(self.tokens), 1, device=last.device)
        answers = inputs.input_ids.gather(1, at)
        if not (answers == torch.tensor(self.tokens, device=last.device)).all():
            raise UserError(
                f"reward {_NAME!r}: the processor of this model writes something after {self.answer!r}, so "
                "its probability cannot be read; take another model"
            )
        scores = self._logits(inputs, at - 1).float().log_softmax(-1)
        return scores.gather(2, answers[..., None])[..., 0].sum(1).exp()

    def _logits(self, inputs: Any, positions: Tensor) -> Float[Tensor, "B K V"]:
        """Return the logits at ``positions`` (B, K); others are not computed if the model supports that."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return self.model(**inputs).logits[rows, positions]
        distinct, index = positions.unique(return_inverse=True)
        return self.model(**inputs, logits_to_keep=distinct).logits[rows, index]


def chat_text(processor: Any, prompt: str) -> str:
    """Return the question in the model's chat template, up to the start of the answer."""
    question = {"type": "text", "text": _QUESTION.format(prompt)}
    message = {"role": "user", "content": [{"type": "image"}, question]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def load(source: str | None, place: Place) -> VQAScore:
    """Load a vision-language model of transformers from a folder or hub id (default: the card's checkpoint).

    Raises:
        UserError: no such model, the hub cannot be reached, or the model is not causal.
    """
    source = source or REGISTRY[_NAME].checkpoint
    processor, soft = _processors(source)
    model = model_of(_NAME, source, place)
    answer, tokens = _answer(processor, source)
    return VQAScore(model, processor, soft, answer, tokens, place.batch_size)


def _processors(source: str) -> tuple[Any, Any]:
    """Return the model's processor for PIL images, and the one for tensors if there is one."""
    from transformers import AutoImageProcessor

    processor = processor_of(_NAME, source, "right")
    soft = copy(processor)
    try:
        soft.image_processor = AutoImageProcessor.from_pretrained(source, backend="torchvision")
    except (ImportError, ValueError):
        return processor, None
    return processor, soft


def _answer(processor: Any, source: str) -> tuple[str, tuple[int, ...]]:
    """Return the text of "Yes" after a question, with a leading space if needed, and its tokens."""
    try:
        question = chat_text(processor, "a")
    except Exception as error:  # a missing or unsuitable template, of many types
        raise unloadable(_NAME, f"the chat template of {source!r}", error, "instead") from error
    tokenizer = processor.tokenizer
    before = tokenizer(question, add_special_tokens=False).input_ids
    ends_in_format = bool(before) and tokenizer.convert_ids_to_tokens(before[-1]) in reserved(tokenizer)
    answer = _ANSWER if ends_in_format or question[-1:].isspace() else f" {_ANSWER}"
    after = tokenizer(question + answer, add_special_tokens=False).input_ids
    tokens = tuple(after[len(before) :])
    if after[: len(before)] != before or not tokens or tokenizer.decode(tokens).strip() != _ANSWER:
        raise UserError(
            f"reward {_NAME!r}: the tokenizer of {source!r} does not write {answer!r} apart from the question"
        )
    return answer, tokens
