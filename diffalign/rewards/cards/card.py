"""The card of a reward: its metadata, available without loading it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardCard:
    """The metadata of a reward, as ``diffalign rewards`` prints it, and the location of its factory.

    Attributes:
        name: the name in a spec.
        title: description in one line.
        low: usual lowest score, in the reward's own units; None if unknown.
        high: usual highest score, in the same units; None if unknown.
        scale_note: further notes on the range of scores.
        factor: the published factor of the cosine, which the option ``scale`` of a spec replaces; None if the
            reward has no such option.
        licence: licence of the weights.
        size: size of the download.
        checkpoint: hub id or file that is loaded if a spec has no source.
        target: the factory, ``module:function``.
        notes: what the reward measures, its caveats and its paper.
        pixels_option: the option of a spec that makes a rollout pass decoded pixels instead of 8-bit images;
            empty if there is none.
        source: the source that a spec must have, in capitals or as an example; empty if none is needed.
        differentiable: whether gradients flow to a tensor of pixels.
        cached: whether scores are cached on disk; False where computing costs no more than a look-up, or the
            reward may change unnoticed.
        video: whether it scores videos (``diffalign.media.videos.Video``) instead of images.
        edits: whether it judges edits and continuations of an image: every prompt must have its source
            (``media.sourced.SourcedPrompt``).
        reads_prompt: whether the score depends on the prompt.
        per_prompt: whether scores are comparable only between images of one prompt.
        needs: requirement to install with pip; empty if there is none.
        of_others: whether its source is a file that lists other rewards (``rewards.ensemble``). Such a reward
            is named after the file, and the cache stores its members' scores.
        prompt_set: the published prompt set whose rows hold what the reward asks (its option ``questions``);
            empty if it needs the prompt alone.
    """

    name: str
    title: str
    licence: str
    size: str
    checkpoint: str
    target: str
    notes: str
    low: float | None = None
    high: float | None = None
    scale_note: str = ""
    factor: float | None = None
    pixels_option: str = ""
    source: str = ""
    differentiable: bool = False
    cached: bool = True
    video: bool = False
    edits: bool = False
    reads_prompt: bool = True
    per_prompt: bool = False
    needs: str = ""
    of_others: bool = False
    prompt_set: str = ""

    @property
    def range(self) -> str:
        """The usual range of scores as text: ``17 to 24 (SD1.5 about 20.5)``."""
        if self.low is None or self.high is None:
            return self.scale_note or "unknown"
        return f"{self.low:g} to {self.high:g}" + (f" ({self.scale_note})" if self.scale_note else "")
