"""The ``data`` section: the preference set, its filters, and the encoding to latents. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from diffalign.config.fields import (
    BATCH,
    BELOW_ONE,
    COUNT,
    COUNT_OR_ZERO,
    NAMES,
    POSITIVE,
    SHARE,
    at_least,
    between,
    multiple,
    option,
    section,
)


@dataclass(frozen=True)
class CurriculumConfig:
    """A curriculum over groups, in descending order of the difference of best and worst score."""

    stages: int = option(0, "number of stages; 0: no curriculum, every group from the start", COUNT_OR_ZERO)
    steps: int = option(500, "optimizer steps of a stage; the last stage goes on to the end", COUNT)
    by: Literal["score", "reward"] = option(
        "score", "difference that orders groups: of the labels, or of data.rewards"
    )
    min_gap: float = option(0.0, "groups with a smaller difference are left out", at_least(0))
    cumulative: bool = option(True, "a stage keeps the groups of the earlier stages")

    @property
    def reads_rewards(self) -> bool:
        """Whether groups are ordered by rewards."""
        return bool(self.stages) and self.by == "reward"


@dataclass(frozen=True)
class AlteredConfig:
    """How a wrong caption of an image is made (data.view captions)."""

    by: Literal["swap", "llm"] = option(
        "swap", "exchange a word offline, or ask an OpenAI-compatible chat endpoint"
    )
    seed: int = option(0, "seed of the exchanged words")
    url: str = option("http://localhost:8000/v1", "address of the endpoint, without /chat/completions")
    model: str = option("", "name of the endpoint's model")
    key: str = option(
        "OPENAI_API_KEY", "name of the environment variable that holds the endpoint's key, if it needs one"
    )
    timeout: float = option(60.0, "seconds that an answer may take", POSITIVE)
    retries: int = option(
        5, "further tries after a failure that may pass; each waits twice as long", between(0, 100)
    )
    answers: str = option(
        "altered_captions.jsonl", "file that keeps the endpoint's answers, so that none is requested twice"
    )


@dataclass(frozen=True)
class FilterConfig:
    """Filters of groups; the run's report counts the groups that each one removes."""

    words: tuple[str, ...] = option((), "leave out prompts that contain one of these, in any case", NAMES)
    min_prompt: int = option(0, "characters that a prompt has at least", COUNT_OR_ZERO)
    max_prompt: int | None = option(None, "characters that a prompt has at most; null: any number", COUNT)
    min_side: int = option(0, "pixels that both sides of every image have at least", COUNT_OR_ZERO)
    repeats: bool = option(False, "leave out groups whose prompt and image files an earlier group has")
    near: int | None = option(
        None,
        "leave out near duplicates of an earlier group of the prompt: bits of 64 in which the perceptual "
        "hashes of their images differ, at most; null: none",
        between(0, 63),
    )
    nsfw: int | None = option(
        None, "number of the reward, from 0, that is a classifier's NSFW score; null: none", COUNT_OR_ZERO
    )
    max_nsfw: float = option(0.5, "highest score of data.filters.nsfw that an image may have", at_least(0))
    agree: int = option(
        0, "rewards that must prefer the image that the label prefers, at least; ties pass", COUNT_OR_ZERO
    )
    agree_keep: Literal["agreeing", "others"] = option(
        "agreeing", "which part data.filters.agree keeps: Semi-DPO's clean pairs, or the others"
    )
    min_margin: float = option(
        0.0,
        "difference of the mean rewards of best and worst image by label, at least; ties pass",
        at_least(0),
    )

    @property
    def reads_rewards(self) -> bool:
        """Whether a filter compares rewards."""
        return self.nsfw is not None or bool(self.agree or self.min_margin)


@dataclass(frozen=True)
class DataConfig:
    """The preference set, and the encoding of its images or videos to latents."""

    path: str = option(
        "",
        "parquet, json, csv, tar file, glob, URL, folder, hub dataset, or tiny:pairs, lists, likes, captions",
    )
    format: Literal[
        "auto", "parquet", "folder", "jsonl", "csv", "hub", "webdataset", "saved", "imagefolder"
    ] = option("auto", "format of data.path; auto: found by its name and contents")
    split: str = option("train", "split of a hub dataset, or of a folder of tables; all: every file")
    config: str | None = option(None, "configuration of a hub dataset that has several")
    columns: tuple[str, ...] = option(
        (), "role=column of a table with names of its own: prompt=caption,chosen=better; dots: nested fields"
    )
    root: str | None = option(None, "folder that the paths in a table are relative to; null: the table's own")
    votes: Literal["soft", "weight", "majority"] = option(
        "soft",
        "use of several votes a pair: P(0 > 1) as soft label, |2 P - 1| as weight for strategy weighted, the "
        "majority alone",
    )
    min_agreement: float = option(0.0, "leave out pairs whose larger share of votes is below this", SHARE)
    downloads: str | None = option(
        None, "folder for images that a set names by web addresses; null: ~/.cache/diffalign/images"
    )
    max_downloads: int | None = option(
        None, "fetch at most this many images named by web addresses; null: all", at_least(0)
    )
    streaming: bool = option(False, "encode a hub dataset as it arrives and keep no copy of it")
    mix: tuple[str, ...] = option(
        (), "further sets, PATH=WEIGHT: each row so many times an epoch, against once of data.path", NAMES
    )
    limit: int | None = option(None, "read at most this many rows", COUNT)
    unreadable: Literal["skip", "refuse"] = option(
        "skip", "rows whose prompt or files are missing or unreadable: left out and counted, or an error"
    )
    label: str = option(
        "", "which of several labels of a set, such as VQ or coherence; empty: the overall or only one"
    )
    view: Literal["auto", "pairs", "likes", "demonstrations", "captions", "majority"] = option(
        "auto",
        "what is made of a group: auto: as the set has it; every pair; each image as liked or not; its best "
        "image; a right and a wrong caption; one label of dense ones, the winner of most segments",
    )
    likes_share: float | None = option(
        0.8, "share of liked images among the single images drawn; null: as the set has them", SHARE
    )
    best: int | None = option(
        None,
        "with view demonstrations: this many images by reward instead of the best of each group",
        COUNT,
    )
    altered: AlteredConfig = section(AlteredConfig)
    rewards: tuple[str, ...] = option(
        (), "rewards that score each image as well (`diffalign rewards`)", NAMES
    )
    rewards_as: Literal["extra", "score", "wins"] = option(
        "extra", "use of data.rewards: beside the label, or instead of it as a score or as wins"
    )
    filters: FilterConfig = section(FilterConfig)
    curriculum: CurriculumConfig = section(CurriculumConfig)
    resolution: int = option(512, "pixels of the square's side, or of buckets of the same area", multiple(8))
    height: int | None = option(None, "pixels, together with data.width: replaces the square", multiple(8))
    width: int | None = option(None, "pixels, together with data.height: replaces the square", multiple(8))
    frames: int | None = option(None, "frames of a video, at most; null: images", between(1, 2**16))
    fps: float | None = option(
        None, "frames a second that videos are read at; null: those of the group's first video", POSITIVE
    )
    segment_seconds: float = option(
        1.0, "seconds that a dense label covers, where the set does not tell", POSITIVE
    )
    own_sizes: bool = option(
        False, "SDXL's size conditions of each image's own size, which may tell who won; else one for a group"
    )
    crop: Literal["center", "random"] = option("center", "part of an image that is kept")
    flip: bool = option(False, "flip images horizontally at random, all images of a group alike")
    buckets: bool = option(False, "aspect-ratio buckets; the images of a group share one")
    bucket_step: int = option(64, "sides of buckets are multiples of this many pixels", multiple(8))
    prompt_dropout: float = option(0.0, "share of groups that are trained on the empty prompt", SHARE)
    flip_labels: float = option(
        0.0, "share of labels that are reversed; 1 is the control whose accuracy must fall", SHARE
    )
    drop: str | None = option(
        None, "file that lists rows to leave out, as `diffalign displacement` writes it"
    )
    time_labels: str | None = option(
        None, "file of labels of pairs in intervals of time, as `diffalign time-labels` writes it (semi_dpo)"
    )
    holdout: float = option(
        0.05, "share of groups that are kept for diagnostics and never trained on", BELOW_ONE
    )
    max_holdout: int = option(256, "groups kept for diagnostics, at most", COUNT_OR_ZERO)
    posterior: Literal["sample", "mean"] = option(
        "sample", "latents of the autoencoder: drawn anew at each visit, or the mean"
    )
    reference_bank: int = option(
        0,
        "draws of noise and time for each pair, taken in turn at random, so that the reference is asked once "
        "about each and not at every visit; 0: fresh noise each time",
        COUNT_OR_ZERO,
    )
    cache_dir: str | None = option(
        None, "folder of the encoded set, or its address (`s3://bucket/cache`); null: OUTPUT/cache"
    )
    stream_block: int = option(
        0,
        "groups that are encoded before training begins, and in blocks of which the first epoch is shuffled; "
        "later blocks are encoded as they are needed; 0: all groups are encoded first",
        COUNT_OR_ZERO,
    )
    cache_batch_size: int = option(
        8, "images encoded at once; for videos also the number held decoded in memory", BATCH
    )
    workers: int = option(0, "processes that read data", between(0, 1024))
    prefetch: int = option(
        2, "micro-batches that threads read ahead of the step, without data.workers; 0: none", between(0, 64)
    )

    @property
    def reads_rewards(self) -> bool:
        """Whether anything here reads the rewards of images; a method or a strategy may besides."""
        of_sections = self.filters.reads_rewards or self.curriculum.reads_rewards
        return of_sections or self.rewards_as != "extra" or self.best is not None
