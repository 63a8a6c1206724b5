"""Preparation of a row for encoding: its keys, missing pixels and maps, and its rewards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.encoded import EncodedImage, Record
from diffalign.data.encoding.geometry import Cut, Size, clips, cut_to, cuts, place_of
from diffalign.data.encoding.hashing import dhash
from diffalign.data.encoding.images import cut_clip, cut_out, image_size
from diffalign.data.encoding.patches import cut_map, read_map
from diffalign.data.encoding.rating import Rater, rescored
from diffalign.data.encoding.writer import Writer
from diffalign.data.reading.dense import Dense, dense_of
from diffalign.data.reading.examples import (
    Example,
    ImageRef,
    Skipped,
    digest,
    turn_scores,
)
from diffalign.errors import UserError
from diffalign.media.images import UNREADABLE, decode, has_further_frames, why_unreadable
from diffalign.media.videos import Probe, probe


@dataclass(frozen=True)
class Prepared:
    """A group whose keys are known.

    Attributes:
        record: the group.
        example: its example.
        pixels: (key, uint8 pixels) of the images that are not in the store; videos are decoded during
            iteration, which may raise an UnreadableError.
        maps: (key, key of its image, weights) of the maps that are not in the store.
        contents: the image files, if rewards score them.
        source: the pixels of the source, uint8 (3, H, W), by key, if they may be needed.
    """

    record: Record
    example: Example
    pixels: Iterable[tuple[str, Tensor]]
    maps: Sequence[tuple[str, str, Tensor]]
    contents: Sequence[bytes]
    source: Mapping[str, Tensor] = field(default_factory=dict)


class UnreadableError(Exception):
    """A file of a row cannot be used; the message is for the user."""


@contextmanager
def _named(reference: ImageRef, name: str) -> Iterator[None]:
    """Turn errors of PIL and others for a bad file into one that names the file, or else ``name``."""
    try:
        yield
    except UNREADABLE as error:
        file = reference.name or name
        raise UnreadableError(f"{file} is unreadable ({why_unreadable(error)})") from error


def prepare(
    example: Example | Skipped, config: DataConfig, writer: Writer, rated: bool = False
) -> Prepared | Skipped:
    """Return an example's keys and the missing inputs; ``rated`` keeps the files for a rater.

    Runs in threads: PIL frees the GIL.
    """
    if isinstance(example, Skipped):
        return example
    try:
        group = _videos(example, config, writer) if config.frames else _images(example, config, writer)
        keys, maps = _maps(example, group.images, writer)
        source, pixels, animated = _source(example, group, config, writer)
    except UnreadableError as error:
        return Skipped(str(error), example.where)
    if len(group.images) > 1 and not example.prompts and len({one.content for one in group.images}) == 1:
        return Skipped("its images are identical", example.where, "identical")
    seen = source.key if source is not None and reads(writer) else ""
    text, *own = (writer.text_key(prompt, seen) for prompt in (example.prompt, *example.prompts))
    record = Record(
        example.prompt,
        text,
        tuple(group.images),
        example.scores,
        example.where,
        tuple(own),
        example.rewards,
        keys,
        example.weight,
        votes=example.votes,
        hashes=tuple(group.hashes),
        source=source,
        empty=writer.text_key("", seen) if seen else None,
        time_labels=example.time_labels,
        animated=(*group.animated, *animated),
    )
    if example.segments:
        record = replace(record, dense=_dense(example, group.images[0].cut, config, writer))
    return Prepared(record, example, group.pixels, maps, group.contents if rated else (), pixels)


def reads(writer: Writer) -> bool:
    """Whether the model's text encoder sees the source."""
    return writer.model.sources is not None and writer.model.sources.read


def _source(
    example: Example, group: "_Group", config: DataConfig, writer: Writer
) -> tuple[EncodedImage | None, dict[str, Tensor], list[str]]:
    """Return the source of a group by its keys, its pixels by them where they are not in the store, and its
    name where it has further frames.

    Raises:
        UserError: a source that the model does not take, or none where it needs one.
    """
    encoders = writer.model.sources
    if example.source is None:
        if encoders is not None and encoders.needed:
            raise UserError(
                f"{example.where}: no source image, and the model draws nothing without one; needed: a "
                "column of it (data.columns source=COLUMN), or a model of another family"
            )
        return None, {}, []
    if encoders is None:
        raise UserError(
            f"{example.where}: the row has a source image, an input beside the prompt, and the model takes "
            "none: it would learn an edit as text-to-image; allowed: a model that takes sources (`diffalign "
            "models` says which), or a set without them"
        )
    if encoders.read and config.flip:
        raise UserError(
            "data.flip is true, but the model's text encoder sees the source image, which would be flipped "
            "without it; allowed: false"
        )
    with _named(example.source, "the source"):
        content = example.source.read()
        animated = _animated(content, example.source.name or f"the source of {example.where}")
        first, name = group.images[0].cut, digest(content)
        place = place_of(config, "".join(image.content for image in group.images))
        cut = replace(cut_to(image_size(content), encoders.size(first.target), place), frames=first.frames)
        key = writer.source_key(name, cut, flipped=False)
        flipped = writer.source_key(name, cut, flipped=True) if config.flip else None
        missing = [one for one in (key, flipped) if one is not None and not writer.has_source(one)]
        pixels = cut_out(decode(content), cut) if missing or encoders.read else None
    if pixels is None:
        return EncodedImage(key, flipped, cut, name), {}, animated
    both = {key: pixels} if flipped is None else {key: pixels, flipped: pixels.flip(-1)}
    return EncodedImage(key, flipped, cut, name), both, animated


def _animated(content: bytes, name: str) -> list[str]:
    """Return the name of an image file that has further frames or pages than the first, or nothing."""
    return [name] if has_further_frames(content) else []


@dataclass(frozen=True)
class _Group:
    """The files of a group: their contents, keys, and missing pixels."""

    contents: Sequence[bytes]
    images: Sequence[EncodedImage]
    pixels: Iterable[tuple[str, Tensor]]
    hashes: Sequence[int] = ()
    animated: Sequence[str] = ()


def _images(example: Example, config: DataConfig, writer: Writer) -> _Group:
    if example.segments:
        raise UserError(f"{example.where}: segments are labels of videos; data.frames is null")
    contents: list[bytes] = []
    sizes: list[Size] = []
    images: list[EncodedImage] = []
    pixels: list[tuple[str, Tensor]] = []
    animated: list[str] = []
    for at, reference in enumerate(example.images):
        with _named(reference, f"image {at}"):
            contents.append(reference.read())
            sizes.append(image_size(contents[-1]))
            animated += _animated(contents[-1], reference.name or f"image {at} of {example.where}")
    names = [digest(content) for content in contents]
    hashes: list[int] = []
    for at, cut in enumerate(cuts(sizes, config, "".join(names))):
        with _named(example.images[at], f"image {at}"):
            images.append(_image(contents[at], names[at], cut, config, writer, pixels))
            if config.filters.near is not None:
                hashes.append(dhash(decode(contents[at])))
    return _Group(contents, images, pixels, hashes, animated)


def _videos(example: Example, config: DataConfig, writer: Writer) -> _Group:
    if config.filters.near is not None:
        raise UserError(
            f"data.filters.near is {config.filters.near}, but the set is of videos; allowed: null, or images"
        )
    contents: list[bytes] = []
    probes: list[Probe] = []
    for at, reference in enumerate(example.images):
        with _named(reference, f"video {at}"):
            contents.append(reference.read())
            probes.append(probe(contents[-1]))
    names = [digest(content) for content in contents]
    cut = clips(probes, config, "".join(names), writer.model.usable_frames)
    if cut is None:
        at = min(range(len(probes)), key=lambda index: probes[index].seconds)
        raise UnreadableError(f"video {at} is too short for the model, {probes[at].seconds:.2f} s")
    images = [
        EncodedImage(
            writer.latent_key(name, own, flipped=False),
            writer.latent_key(name, own, flipped=True) if config.flip else None,
            own,
            name,
        )
        for name, own in zip(names, cut, strict=True)
    ]
    return _Group(contents, images, _decoded(example, images, writer))


def _decoded(
    example: Example, images: Sequence[EncodedImage], writer: Writer
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, pixels) of the missing videos, decoded one at a time."""
    for at, (reference, image) in enumerate(zip(example.images, images, strict=True)):
        for key in (image.key, image.flipped):
            if key is None or writer.has(key):
                continue
            with _named(reference, f"video {at}"):
                pixels = [cut_clip(reference.read(), image.cut)]
            yield key, pixels.pop() if key == image.key else pixels.pop().flip(-1)


def _dense(example: Example, cut: Cut, config: DataConfig, writer: Writer) -> Dense:
    seconds = example.segment_seconds or config.segment_seconds
    frames = writer.model.latent_frames(cut.frames)
    return dense_of(example.segments, seconds, cut, frames, writer.model.frames_of)


def _image(
    content: bytes, name: str, cut: Cut, config: DataConfig, writer: Writer, pixels: list[tuple[str, Tensor]]
) -> EncodedImage:
    """Return an encoded image; its missing pixels are added to ``pixels``."""
    key = writer.latent_key(name, cut, flipped=False)
    flipped = writer.latent_key(name, cut, flipped=True) if config.flip else None
    if not (writer.has(key) and (flipped is None or writer.has(flipped))):
        values = cut_out(decode(content), cut)
        pixels.append((key, values))
        if flipped:
            pixels.append((flipped, values.flip(-1)))
    return EncodedImage(key, flipped, cut, name)


def _maps(
    example: Example, images: Sequence[EncodedImage], writer: Writer
) -> tuple[tuple[str | None, ...], list[tuple[str, str, Tensor]]]:
    """Return the key of each image's map, and (key, image's key, weights) of those that are missing."""
    keys: list[str | None] = []
    missing = []
    for at, reference in enumerate(example.patches):
        if reference is None:
            keys.append(None)
            continue
        with _named(reference, f"map {at}"):
            content = reference.read()
            key = writer.map_key(digest(content), images[at].cut)
            if not writer.has_map(key):
                missing.append((key, images[at].key, cut_map(read_map(content), images[at].cut)))
        keys.append(key)
    return tuple(keys), missing


def rate(
    rows: Iterable[tuple[int, Prepared | Skipped]], rater: Rater | None, config: DataConfig
) -> Iterator[tuple[int, Prepared | Skipped]]:
    """Yield the rows in order with the rater's scores, computed for ``config.cache_batch_size`` groups at
    once, and with scores in place of labels where configured.
    """
    waiting: list[tuple[int, Prepared | Skipped]] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) >= config.cache_batch_size:
            yield from _rated(waiting, rater, config)
            waiting = []
    yield from _rated(waiting, rater, config)


def _rated(
    rows: list[tuple[int, Prepared | Skipped]], rater: Rater | None, config: DataConfig
) -> Iterator[tuple[int, Prepared | Skipped]]:
    groups = [prepared for _, prepared in rows if isinstance(prepared, Prepared)]
    fresh: Iterator[tuple[float, ...]] = iter(())
    if rater is not None and groups:
        prompts = [
            prompt
            for group in groups
            for prompt in group.example.prompts or [group.example.prompt] * len(group.contents)
        ]
        fresh = iter(rater([content for group in groups for content in group.contents], prompts))
    for index, prepared in rows:
        if not isinstance(prepared, Prepared):
            yield index, prepared
            continue
        record, example = prepared.record, prepared.example
        if rater is not None:
            rewards = example.rewards or ((),) * len(record.images)
            record = replace(record, rewards=tuple((*known, *next(fresh)) for known in rewards))
        if config.rewards_as != "extra":
            scores = rescored(record.scores, record.rewards, config.rewards_as, record.where)
            scores = turn_scores(scores) if example.turned else scores
            record = replace(record, scores=scores, dense=None, votes=())
        yield index, replace(prepared, record=record)
