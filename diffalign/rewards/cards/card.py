"""What a reward says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardCard:
    """What a reader of ``diffalign rewards`` needs to know, and where the code is.

    Attributes:
        name: how a spec names it.
        title: one line.
        range: usual values.
        licence: of the weights.
        size: of the download.
        checkpoint: hub id or file that is loaded when a spec has no source.
        target: ``module:factory``.
        notes: what it measures, what to beware of, where it comes from.
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
    range: str
    licence: str
    size: str
    checkpoint: str
    target: str
    notes: str
    source: str = ""
    differentiable: bool = False
    cached: bool = True
    video: bool = False
    reads_prompt: bool = True
    per_prompt: bool = False
    needs: str = ""
    of_others: bool = False
