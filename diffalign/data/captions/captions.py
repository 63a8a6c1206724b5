"""The view ``captions``: an image under its own caption, score 1, and under one made wrong, score 0.

Preference between prompts for one image (text preference optimisation, arXiv 2509.25771) needs no second
image. Of a pair or a list the best image is taken, of single ones those that are liked; ties have no best.
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
        alter: a caption made wrong, or None where that cannot be done.
    """

    alter: Swap | Chat

    @property
    def fingerprint(self) -> str:
        """Changes whenever the altered captions may."""
        return self.alter.fingerprint

    def __call__(self, example: Example) -> Example | Skipped:
        """Return the example's best image under two captions; one that has two already is left as it is."""
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
        )


def captioned(config: AlteredConfig) -> Captioned:
    """Return the view with the alterations of a configuration; UserError for a setting that is missing."""
    return Captioned(Chat(config) if config.by == "llm" else Swap(config.seed))
