"""Published preference sets as a table of schemas: which columns hold the prompt, the files and the label.

A schema states the required columns, the places of images or videos, the form of the label (ties and votes
included) and which rows are rivals. A table is recognised by its columns, never by its name; the first
matching schema of ``SCHEMAS`` is used. Columns are those of the sets' cards and loading code (2026-11);
comments mark those that were not checked against a copy.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffalign.data.reading.cells import cell, listed, mapping
from diffalign.data.reading.labels import (
    BestUid,
    Checklist,
    Choice,
    Conversation,
    Label,
    Liked,
    Listed,
    Ordered,
    PerModel,
    Rating,
    Scored,
    Tally,
    Votes,
)
from diffalign.errors import UserError

PROMPTS = ("caption", "prompt", "original_prompt", "sentence", "text", "instruction", "edit_instruction")
Values = list[tuple[str, Any]]


class Files(Protocol):
    """The places of a row's images or videos."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs."""
        ...

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return (column, value) of each; None where there is no list."""
        ...


@dataclass(frozen=True)
class Columns:
    """A column each; dots enter nested fields."""

    columns: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return the columns' values."""
        return [(name, cell(row, name)) for name in self.columns]


@dataclass(frozen=True)
class ListOf:
    """One column that holds them all, two or more."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the list."""
        return (self.column,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return the list's values."""
        values = cell(row, self.column)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise UserError(f"{where}: {self.column} is {str(values)[:60]}; allowed: a list of two or more")
        return [(self.column, value) for value in values]


@dataclass(frozen=True)
class OfModels:
    """Columns that are named by the keys of an object of ratings."""

    ratings: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the ratings; the others are known by the row."""
        return (self.ratings,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return the value of each model's column."""
        return [
            (model, row.get(model)) for model in mapping(row.get(self.ratings), self.ratings, where) or {}
        ]


@dataclass(frozen=True)
class Named:
    """Files that are named after a column, such as ``{id}.mp4``."""

    column: str
    pattern: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the name."""
        return (self.column,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return the file's name."""
        value = row.get(self.column)
        return [(self.column, None if value is None else self.pattern.format(value))]


@dataclass(frozen=True)
class WinLose:
    """VideoDPO's layout: clip 2 n is ``winvideos/00000n.mp4``, clip 2 n + 1 is ``losevideos/00000n.mp4``."""

    columns: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any], where: str) -> Values | None:
        """Return the path of each clip."""
        numbers = [(name, row.get(name)) for name in self.columns]
        for name, value in numbers:
            if not isinstance(value, int):
                raise UserError(f"{where}: {name} is {value!r}; allowed: the number of a clip")
        folders = ("winvideos", "losevideos")
        return [
            (name, f"{folders[value % 2]}/{value // 2:06d}.mp4")
            for name, value in numbers
            if value is not None
        ]


@dataclass(frozen=True)
class Schema:
    """A published layout.

    Attributes:
        name: of the set or the tool whose layout it is.
        files: the places of images or videos.
        labels: readers of the label, by the name for ``data.label``; the first is the default.
        prompt: columns of the prompt; the first one present counts.
        group: rows of equal value in this column are rivals; "" compares rows of one prompt; None: a row is a
            group.
        needs: further required columns.
        roots: folders that paths may be relative to, seen from the table's folder.
        video: whether the files are videos; None if the columns do not show it.
        within: a regular expression that finds the prompt in its column's text.
        inputs: a column that lists the inputs besides the prompt: none, or the source image.
        extras: further columns that are read if they exist.
        rated: only where rewards give the scores.
        plain: only where a caption and an image are enough.
        altered: the wrong caption of the one image.
    """

    name: str
    files: Files
    labels: Mapping[str, Label] = field(default_factory=lambda: {"": Ordered()})
    prompt: tuple[str, ...] = PROMPTS
    group: str | None = None
    needs: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("",)
    video: bool | None = None
    within: str = ""
    inputs: str = ""
    extras: tuple[str, ...] = (
        "rewards", "patches", "mask", "time_labels", "weight", "segments", "segment_seconds", "are_different",
    )  # fmt: skip
    rated: bool = False
    plain: bool = False
    altered: bool = False


@dataclass(frozen=True)
class Dense:
    """No label but those of segments."""

    columns: tuple[str, ...] = ("segments",)
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> None:
        """Return None."""
        listed(row.get("segments"), "segments", where)


def _one(label: Label) -> Mapping[str, Label]:
    return {"": label}


def _pair(first: str, second: str, label: Label, name: str, **more: Any) -> Schema:
    return Schema(name, Columns((first, second)), _one(label), **more)


def _rapidata(kind: str, form: str, criteria: tuple[str, ...]) -> Mapping[str, Label]:
    """Return the three questions of Rapidata's sets, by name."""
    return {name.lower(): Votes((form.format(1, name), form.format(2, name))) for name in criteria}


_ASKED = ("preference", "coherence", "alignment")
_WEIGHTED = _rapidata("image", "weighted_results_image{}_{}", _ASKED)
_FILM = _rapidata("video", "weighted_results{}_{}", tuple(name.capitalize() for name in _ASKED))
_FILM_LATER = _rapidata("video", "weighted_results_video{}_{}", _ASKED)
_HPD = ("", "train", "test", "images")
_CLIPS = ("", "videos", "../videos")
_VIDEOALIGN: Mapping[str, Label] = {name: Choice(name) for name in ("Overall", "VQ", "MQ", "TA")}
_FEEDBACK = (
    "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment",
    "factual consistency",
)  # fmt: skip

SCHEMAS: tuple[Schema, ...] = (
    # our own names and trl's: the roles of data.columns
    _pair("jpg_0", "jpg_1", Scored(), "Pick-a-Pic"),
    _pair("video_0", "video_1", Scored(), "pairs of videos", video=True),
    _pair("image_0", "image_1", Scored(), "pairs of images"),
    _pair("image_0", "image_1", Votes(("votes_0", "votes_1")), "pairs with votes"),
    _pair("image_0", "image_1", Tally("votes"), "pairs with votes"),
    _pair("image_0", "image_1", Choice("label"), "pairs with a label"),
    _pair("video_0", "video_1", Votes(("votes_0", "votes_1")), "pairs of videos with votes", video=True),
    _pair("video_0", "video_1", Tally("votes"), "pairs of videos with votes", video=True),
    _pair("video_0", "video_1", Choice("label"), "pairs of videos with a label", video=True),
    _pair("jpg_0", "jpg_1", BestUid(), "Pick-a-Pic"),
    _pair("chosen", "rejected", Ordered("confidence", "votes"), "chosen and rejected"),
    _pair("path1", "path2", Ordered("confidence", "choice_dist", "tie_case"), "EditReward-Data",
          needs=("path_src",)),
    _pair("path1", "path2", Ordered("confidence", "choice_dist"), "HPDv3"),
    Schema("ranked list", ListOf("images"), _one(Listed())),
    Schema("ranked list", ListOf("images"), _one(Listed("ranks", ranks=True))),
    Schema("list to be scored by rewards", ListOf("images"), _one(Dense(())), rated=True),
    Schema("segments of videos", ListOf("images"), _one(Dense())),
    Schema("likes", Columns(("image",)), _one(Liked())),
    Schema("an image and a wrong caption", Columns(("image",)), needs=("altered",), altered=True),
    Schema("ranked list of videos", ListOf("videos"), _one(Listed()), video=True),
    Schema("ranked list of videos", ListOf("videos"), _one(Listed("ranks", ranks=True)), video=True),
    Schema("videos to be scored by rewards", ListOf("videos"), _one(Dense(())), rated=True, video=True),
    Schema("segments of videos", ListOf("videos"), _one(Dense()), video=True),
    Schema("likes of videos", Columns(("video",)), _one(Liked()), video=True),
    Schema("a video and a wrong caption", Columns(("video",)), needs=("altered",), altered=True, video=True),
    # published sets of images
    _pair("image_0_url", "image_1_url", Scored(), "Pick-a-Pic without images"),
    _pair("image_0_url", "image_1_url", BestUid(), "Pick-a-Pic without images"),
    Schema("ImageRewardDB", Columns(("image",)), _one(Rating(("rank",), rank=True)), group="prompt_id"),
    Schema("ImageRewardDB (json)", Columns(("image_path",)), _one(Rating(("rank",), rank=True)),
           group="prompt_id", roots=("", "..", "images")),
    Schema("HPDv2 (train)", ListOf("file_path"), _one(Listed("human_preference")), roots=_HPD),
    Schema("HPDv2 (train)", ListOf("image_path"), _one(Listed("human_preference")), roots=_HPD),
    Schema("HPDv2 (test)", ListOf("image_path"), _one(Listed("rank", ranks=True)), roots=_HPD,
           extras=("raw_annotations",)),
    _pair("img_better", "img_worse", Ordered(), "ImageRewardDB (pairs)"),
    _pair("image1", "image2", Votes(("votes_image1", "votes_image2")), "Rapidata (votes)"),
    Schema("Rapidata (weighted results)", Columns(("image1", "image2")), _WEIGHTED),
    _pair("image1", "image2", Tally("aggregated_results"), "open-image-preferences-more-results"),
    Schema("Rapidata (rich feedback)", Columns(("image",)), _one(
        Rating(("alignment_score", "coherence_score", "style_score"), 1, 5)), group=""),
    Schema("RichHF-18k", Columns(("image",)), _one(Rating(("overall_score",))), group="",
           needs=("artifact_score",)),
    Schema("RichHF-18k", Columns(("image",)), _one(Rating(("aesthetics_score", "artifact_score"))), group=""),
    Schema("VisionRewardDB-Image", Columns(("image",)), _one(Checklist()), group="", needs=("annotation",)),
    Schema("GenAI-Bench", OfModels("HumanRatings"), _one(PerModel()), prompt=("Prompt",)),
    Schema("ImageGen-CoT-Reward", ListOf("images"), _one(Conversation()), prompt=("conversations.0.value",),
           within=r"(?:text\s+)?(?:caption|prompt)\W*[:\uff1a]\W*\[?[\"'\u201c]?(.+?)[\"'\u201d]?\]?\s*(?:\n|$)"),
    # published sets of videos
    Schema("VideoAlign", Columns(("path_A", "path_B")), _VIDEOALIGN, video=True),
    Schema("Rapidata (videos)", Columns(("file_name1", "file_name2")), _FILM, roots=_CLIPS, video=True),
    Schema("Rapidata (videos)", Columns(("video1", "video2")), _FILM_LATER, roots=_CLIPS, video=True),
    *(Schema("VisionRewardDB-Video", Columns(("video1_path", "video2_path")), _one(Choice(name)), video=True,
             roots=("", "..", "videos")) for name in ("standard_answer", "human_preference")),
    Schema("VisionRewardDB-Video (annotations)", Columns(("video_path",)), _one(Checklist()), group="",
           roots=("", "..", "videos"), video=True),
    Schema("VideoDPO", WinLose(("video1", "video2")), prompt=("frame_caption",), video=True),
    Schema("VideoFeedback", Named("id", "{}.mp4"), _one(Rating(_FEEDBACK, 1, 4)), prompt=("text prompt",),
           group="", roots=("", "videos", "videos_annotated", "train", "test"), video=True),
    # formats of other tools
    Schema("Flow-Factory (preferences)", Columns(
        ("supervision.chosen.media.0.path", "supervision.rejected.media.0.path")), prompt=("input.prompt",),
        needs=("schema_version",), inputs="input.media"),
    Schema("Flow-Factory (demonstrations)", Columns(("supervision.target.media.0.path",)),
           _one(Liked(always=True)), prompt=("input.prompt",), needs=("schema_version",),
           inputs="input.media"),
    # where nothing but a caption is needed
    Schema("captioned images", Columns(("image",)), _one(Liked(always=True)), plain=True),
    Schema("captioned videos", Columns(("video",)), _one(Liked(always=True)), plain=True, video=True),
)  # fmt: skip


def media_columns(columns: Collection[str]) -> Columns | ListOf | None:
    """Return the columns of images or videos among these columns, by the first schema whose files are
    present; None if there is none. Labels are not considered.
    """
    for schema in SCHEMAS:
        files = schema.files
        if isinstance(files, Columns | ListOf) and set(files.columns) <= set(columns):
            return files
    return None
