"""VisionReward's checklist, answered by any vision-language model of transformers.

Xu et al., "VisionReward: Fine-Grained Multi-Dimensional Human Preference Learning for Image and Video
Generation", arXiv 2412.21059. Questions with the answers yes (1) and no (-1) have published weights w_i; an
answer about a body, a face or hands counts 0 where the model sees none (its gate g). With VQAScore's
probability p that the image shows the prompt,

    score = w p + sum_i w_i a_i [g_i is yes].

Here a model gives the probability y_i of "Yes" against "No" at the next token, and the score is its
expectation for independent answers, which has a gradient: w p + sum_i w_i (2 y_i - 1) y_g. With ``hard=yes``
answers are the likelier ones, as the published code takes them.

The published answers are those of a CogVLM2 (``THUDM/VisionReward-Image``, weights of SwissArmyTransformer in
parts) that was trained on the questions, with an alignment p by CLIP-FlanT5. Current transformers runs
neither, so scores here are another model's with the published questions and weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import places_and_options, yes_or_no
from diffalign.rewards.zoo.checklist_questions import ALIGNMENT, ITEMS
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved
from diffalign.rewards.zoo.vision_language import Reader, reader_of

_NAME = "checklist"
_ASKED = "{} Please answer Yes or No."
_SHOWN = 'Does this figure show "{}"?'  # VQAScore's question


@dataclass(frozen=True)
class Checklist:
    """The reward.

    Attributes:
        reader: the model.
        tokens: the first tokens of Yes and No as answers.
        hard: whether answers are the likelier ones instead of expectations.
        batch_size: images a forward pass, of which there is one for each question.
    """

    reader: Reader
    tokens: tuple[int, ...]
    hard: bool = False
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,), float32; tensors (B, 3, H, W) take the differentiable path.

        Raises:
            UserError: an empty prompt, or one that holds a special token of the model.
        """
        refuse_unreadable(_NAME, prompts, reserved(self.reader.processor.tokenizer))
        return in_batches(self._score, images, prompts, self.batch_size)

    def answers(self, images: Images, prompts: Sequence[str]) -> Mapping[str, Float[Tensor, " B"]]:
        """Return the probabilities of yes by question; that of the prompt has the name ""."""
        gates = dict.fromkeys(item.gate for item in ITEMS if item.gate)
        found = {
            question: self._yes(images, [question] * len(prompts))
            for question in (*gates, *(item.question for item in ITEMS))
        }
        return found | {"": self._yes(images, [_SHOWN.format(prompt) for prompt in prompts])}

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        yes = self.answers(images, prompts)
        total = ALIGNMENT * yes[""]
        for item in ITEMS:
            answer, gate = yes[item.question], yes[item.gate] if item.gate else None
            if self.hard:
                answer = (answer >= 0.5).float()
                gate = None if gate is None else (gate >= 0.5).float()
            total = total + item.weight * (2 * answer - 1) * (1 if gate is None else gate)
        return total

    def _yes(self, images: Images, questions: Sequence[str]) -> Float[Tensor, " B"]:
        texts = [self.reader.asked(_ASKED.format(question)) for question in questions]
        logits = self.reader.next_token(images, texts)
        probability: Tensor = logits[:, list(self.tokens)].softmax(-1)[:, 0]
        return probability


def load(source: str | None, place: Place) -> Checklist:
    """Load a vision-language model of transformers from a folder or hub id, with the option ``hard``.

    Raises:
        UserError: no such model, the hub cannot be reached, the model is not causal or has no chat template,
            or its tokenizer begins Yes and No with one token.
    """
    (where,), options = places_and_options(_NAME, source, 1, ["hard"])
    hard = yes_or_no(_NAME, "hard", options.get("hard", "no"))
    reader = reader_of(_NAME, where or REGISTRY[_NAME].checkpoint, place)
    words = [reader.answer(word).text for word in ("Yes", "No")]
    tokens = reader.first_tokens(reader.any_question(), words)
    return Checklist(reader, tokens, hard, place.batch_size)
