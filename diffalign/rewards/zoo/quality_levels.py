"""Quality of an image by the level words of a vision-language model, as Q-Align and DeQA-Score read them.

Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", arXiv 2312.17090; You
et al., "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score Distribution"
(DeQA-Score), arXiv 2501.11561. The model is asked how it would rate the image, its answer is begun for it
("The quality of the image is"), and the logits of five words at the next position are compared:

    score = sum_i w_i softmax(l)_i,   w = 1, 0.75, 0.5, 0.25, 0 for excellent, good, fair, poor, bad.

DeQA-Score's weights 5 to 1 give 1 + 4 score. The published weights (``q-future/one-align``,
``zhiyuanyou/DeQA-Score-Mix3``) are mPLUG-Owl2 with code of their own for transformers 4.36, which current
transformers does not run; a server in an environment of their own can answer for them, in the protocol of
``rewards.serving.remote``. Here any vision-language model of transformers is asked, trained on levels or not.
Scores of different models do not compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import unknown
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import places_and_options
from diffalign.rewards.zoo.vision_language import Reader, reader_of

_NAME = "quality_levels"
LEVELS = {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0}
ASPECTS = {
    "quality": ("How would you rate the quality of this image?", "The quality of the image is"),
    "aesthetics": ("How would you rate the aesthetics of this image?", "The aesthetics of the image is"),
}


@dataclass(frozen=True)
class QualityLevels:
    """The reward.

    Attributes:
        reader: the model.
        text: the question in the chat template, and the start of the answer.
        tokens: the first token of each word of LEVELS after the text.
        batch_size: images a forward pass.
    """

    reader: Reader
    text: str
    tokens: tuple[int, ...]
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) in [0, 1], float32; tensors (B, 3, H, W) take the differentiable path.

        Prompts are not read.
        """
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        logits = self.reader.next_token(images, [self.text] * len(prompts))
        weights = torch.tensor(list(LEVELS.values()), device=logits.device)
        scores: Tensor = logits[:, list(self.tokens)].softmax(-1) @ weights
        return scores


def load(source: str | None, place: Place) -> QualityLevels:
    """Load a vision-language model of transformers from a folder or hub id, with the option ``about``.

    Raises:
        UserError: no such model, the hub cannot be reached, the model is not causal or has no chat template,
            its tokenizer begins two words with one token, or an unknown ``about``.
    """
    (where,), options = places_and_options(_NAME, source, 1, ["about"])
    about = options.get("about", "quality")
    if about not in ASPECTS:
        raise unknown(f"option about of the reward {_NAME!r}:", about, ASPECTS)
    reader = reader_of(_NAME, where or REGISTRY[_NAME].checkpoint, place)
    question, beginning = ASPECTS[about]
    begun = reader.answer(beginning).text
    text = reader.asked(question) + begun
    tokens = reader.first_tokens(text, [f" {word}" for word in LEVELS])
    return QualityLevels(reader, text, tokens, place.batch_size)
