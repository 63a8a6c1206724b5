"""The card of a reward: what users and other code must know before it is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardCard:
    """A reward as ``diffalign rewards`` describes it, and where its code is.

    Attributes:
        name: how a spec names it.
        title: one line.
        low: usual smallest score, in the reward's own units; None: not known.
        high: usual largest score.
        scale_note: what else is known of the scores.
        factor: of the cosine in the scores, where the option ``scale`` replaces it; None: no such option.
        licence: of the weights.
        size: of the download.
        checkpoint: hub id or file that is loaded when a spec has no source.
        target: ``module:factory``.
        notes: what it measures, what to beware of, where it comes from.
        pixels_option: the option of a spec with which a rollout hands over decoded pixels instead of 8-bit
            images; empty: there is none.
        source: what a spec must say after its colon, in capitals or as an example; empty: nothing.
        differentiable: gradients flow to pixels given as a tensor.
        cached: scores are worth keeping on disk; False where computing is as cheap as looking up.
        video: judges videos (``diffalign.media.videos.Video``) and no images.
        reads_prompt: False where the prompt changes nothing.
        per_prompt: scores are for comparing images of one prompt; between prompts they say little.
        needs: what to install besides, as pip is told; empty: nothing.
        of_others: its source is a file that names other rewards (``rewards.ensemble``), which gives it its
            name and whose members' scores are kept instead of its own.
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
    reads_prompt: bool = True
    per_prompt: bool = False
    needs: str = ""
    of_others: bool = False

    @property
    def range(self) -> str:
        """The usual scores in words: ``17 to 24 (SD1.5 about 20.5)``."""
        if self.low is None or self.high is None:
            return self.scale_note or "unknown"
        return f"{self.low:g} to {self.high:g}" + (f" ({self.scale_note})" if self.scale_note else "")
