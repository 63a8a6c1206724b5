"""Set up a run that trains while its preference set is still being encoded (``data.stream_block``)."""

from collections.abc import Callable
from typing import Any

import torch

from diffalign.config.schema import Run
from diffalign.data import Preferences
from diffalign.data.batches.streamed import StreamedSource
from diffalign.data.encoding.stream import Stream
from diffalign.data.reading.examples import Counts
from diffalign.errors import UserError
from diffalign.methods._common import OfScores
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES
from diffalign.models.placing import move_networks
from diffalign.models.precision import AUTOCAST
from diffalign.runs.labels import (
    check_labels,
    check_rivals,
    look_at_labels,
    look_at_votes,
    tell_of_contents,
    tell_of_unread,
    tell_of_votes,
    tell_unliked,
)
from diffalign.runs.memory_advice import when_encoding
from diffalign.runs.resume import data_content
from diffalign.runs.roles import assign_roles
from diffalign.runs.setup import Setup, cache_of, check_frames, diagnostics, guided, size
from diffalign.runs.validation import ValidationHook
from diffalign.training.acceleration import Accelerator
from diffalign.types import Method
from diffalign.utils.memory import advised


def check_streaming(run: Run, method: Method[Any]) -> None:
    """Check that no setting of a streamed run needs the whole set, or needs the encoders otherwise.

    Raises:
        UserError: the first setting that does.
    """
    data = run.data
    needs = {
        "data.buckets": data.buckets,
        "data.view": data.view != "auto",
        "data.curriculum.stages": data.curriculum.stages,
        "data.filters.repeats": data.filters.repeats,
        "data.filters.near": data.filters.near is not None,
        "data.drop": data.drop is not None,
        "data.time_labels": data.time_labels is not None,
        "data.workers": data.workers,
        "training.epochs": run.training.epochs is not None,
        "validation.every": run.validation.every,
        f"method.type {run.method['type']!r}, which reads scores as numbers,": isinstance(method, OfScores),
    }
    for name, needed in needs.items():
        if data.stream_block and needed:
            raise UserError(
                f"data.stream_block={data.stream_block}: {name} needs the whole set to be encoded before "
                "training; allowed: data.stream_block 0, or that setting at its default"
            )


def streamed(
    run: Run,
    model: LoadedModel,
    inner: Method[Any],
    method: Method[Any],
    *,
    preferences: Preferences,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> Setup:
    """Encode the first block of a preference set, hold out some of its groups, and prepare the network.

    Groups are held out of the first block only; groups of later blocks with the same prompts are dropped. A
    resumed run compares the content of the first block.

    Raises:
        UserError: as ``offline``; several processes.
    """
    data = run.data
    if accelerator.num_processes > 1:
        raise UserError(
            f"data.stream_block={data.stream_block} in {accelerator.num_processes} processes; allowed: one "
            "process, or `diffalign cache` in as many as there are and then data.stream_block 0"
        )
    check_frames(data, model)
    look_at_labels(run, inner, preferences)
    look_at_votes(run, preferences, tell)
    for note in preferences.notes:
        tell(f"data: {note}")

    def finished(counts: Counts) -> None:
        model.free_encoders()
        tell(f"data: encoded to the end: {counts.text}")
        tell_unliked(run.method["type"], counts, tell)

    folder, rater = cache_of(run, accelerator)
    half = DTYPES[run.model.dtype] != torch.float32
    with advised("encoding the preference set", when_encoding(run)):
        stream = Stream(model, preferences, data, folder, half=half, rater=rater, finished=finished)
        source = StreamedSource(
            stream,
            model.family,
            data,
            run.training.batch_size,
            accumulation=run.training.accumulation,
            seed=run.training.seed,
            guided=guided(inner),
        )
    if data.likes_share is not None and (source.learned.records.sizes == 1).all():
        raise UserError(
            f"data.stream_block={data.stream_block}: data.likes_share={data.likes_share} of single images "
            "needs the whole set to be encoded before training; allowed: 0, or likes_share null"
        )
    check_labels(run, inner, source.held_out.dense)
    check_rivals(run, source.learned, tell)
    tell_of_contents(source.learned, lambda line: tell(f"{line} (of the first block)"))
    tell_of_votes(run, source.learned, tell)
    tell_of_unread(run, inner, source.learned, tell)
    move_networks(model, accelerator.device)
    roles = assign_roles(run, model, method, AUTOCAST[run.training.mixed_precision])
    tell(
        f"training {size(roles):,} parameters; streamed: {source.begun} groups are there when training "
        f"begins, {len(source.held_out)} held out"
    )
    outcome = diagnostics(run, model, source.held_out, inner, roles.base)
    return Setup(
        source,
        roles,
        [outcome, ValidationHook(run, model, (), tell)],
        outcome,
        f"streamed from {source.begun} groups on",
        data_content(source.learned, source.held_out),
    )
