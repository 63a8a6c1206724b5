"""The view ``captions``: an image with its own caption, score 1, and with a wrong one, score 0.

Preference between prompts for one image (text preference optimisation, arXiv 2509.25771) needs no second
image. The best image of a pair or a list is used, and of single images the liked ones; ties have no best.
"""

from dataclasses import dataclass

from diffalign.config.schema import AlteredConfig
from diffalign.data.captions.chat import Chat
from diffalign.data.captions.perturb import Swap
from diffalign.data.reading.examples import Example, Skipped


@dataclass(frozen=True)
class Captioned:
    """Makes caption pairs of examples.

    Attributes:
        alter: caption -> wrong caption, or None where there is none.
    """

    alter: Swap | Chat

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the altered captions may."""
        return self.alter.fingerprint

    def __call__(self, example: Example) -> Example | Skipped:
        """Return the example's best image with two captions; an example with two captions is unchanged."""
        if example.prompts:
            return example
        alone = len(example.images) == 1
        if not example.scores or example.is_tie or (alone and not example.scores[0] > 0):
            return Skipped("no image that is preferred", example.where, "unlabelled")
        best = max(range(len(example.images)), key=example.scores.__getitem__)
        wrong = self.alter(example.prompt)
        if wrong is None:
            return Skipped("no word to change", example.where, "unaltered")
        pick = lambda values: (values[best],) * 2 if values else ()  # noqa: E731
        return Example(
            example.prompt,
            pick(example.images),
            (1.0, 0.0),
            example.where,
            (example.prompt, wrong),
            pick(example.rewards),
            pick(example.patches),
            example.weight,
            source=example.source,
        )


def captioned(config: AlteredConfig) -> Captioned:
    """Return the view with the alterations of a configuration; UserError for a setting that is missing."""
    return Captioned(Chat(config) if config.by == "llm" else Swap(config.seed))
