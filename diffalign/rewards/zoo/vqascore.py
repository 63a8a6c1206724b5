"""VQAScore: the probability that a vision-language model answers "Yes" to whether the image shows the prompt.

Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291, with any
vision-language model of transformers (``vision_language``). A tokenizer may write the answer with a leading
space or as several tokens, so the answer is appended to the text, and the probabilities of its tokens are
multiplied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved
from diffalign.rewards.zoo.vision_language import Answer, Reader, reader_of

_NAME = "vqascore"
_QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'


@dataclass(frozen=True)
class VQAScore:
    """A vision-language model and the answer whose probability is the score; ``batch_size`` images a pass."""

    reader: Reader
    answer: Answer
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) in [0, 1], float32; tensors (B, 3, H, W) take the differentiable path.

        Raises:
            UserError: an empty prompt, or one that holds a special token of the model.
        """
        refuse_unreadable(_NAME, prompts, reserved(self.reader.processor.tokenizer))
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        questions = [_QUESTION.format(prompt) for prompt in prompts]
        return self.reader.probability(images, questions, self.answer)


def load(source: str | None, place: Place) -> VQAScore:
    """Load a vision-language model of transformers from a folder or hub id (default: the card's checkpoint).

    Raises:
        UserError: no such model, the hub cannot be reached, or the model is not causal.
    """
    reader = reader_of(_NAME, source or REGISTRY[_NAME].checkpoint, place)
    return VQAScore(reader, reader.answer("Yes"), place.batch_size)
