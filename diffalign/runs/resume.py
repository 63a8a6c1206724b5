"""Which starts continue the same run: those with the same resolved method, settings without paths, data and
model.

A run's record (``config.yaml``, the fingerprint of its checkpoints) holds the method as it was built, with
every default. Paths of data and model may change; their content is compared by digests once both are loaded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

from diffalign.config.build import describe
from diffalign.config.reward_schema import AnyRun, RewardRun
from diffalign.config.schema import Run
from diffalign.data import EncodedSet
from diffalign.data.encoding.content import LARGE, content_digest
from diffalign.errors import UserError, unknown
from diffalign.methods import build
from diffalign.models.loaded import LoadedModel, weight_digests
from diffalign.strategies import build as build_strategies
from diffalign.training.checkpoint import LENGTH, Snapshot, differences, fingerprint, flatten
from diffalign.types import Method

# What may differ between a run and its continuation: it changes where things are kept, and no number.
FREE = (
    "data.cache_dir",
    "data.workers",
    "data.prefetch",
    "data.unreadable",
    "data.cache_batch_size",
    "rollout.page",
    "rollout.page_port",
    "rollout.decoded_frames",
    "model.gradient_checkpointing",
    "model.offload_activations",
    "training.shard",
    "training.reshard",
    "training.context",
    "method.cache",
    "method.noising.cache",
)
# Paths of data and model, and how they are read: their content is compared instead.
PLACES = (
    "data.path",
    "data.format",
    "data.split",
    "data.config",
    "data.root",
    "data.downloads",
    "data.max_downloads",
    "data.streaming",
    "data.drop",
    "data.time_labels",
    "data.altered.answers",
    "model.path",
    "model.revision",
    "model.variant",
    "model.vae",
    "model.motion_adapter",
    "rollout.prompts",
)
# Settings that are, or may be, a file or a folder.
_FILES = (
    "data.path",
    "data.drop",
    "data.time_labels",
    "data.cache_dir",
    "data.root",
    "data.downloads",
    "data.altered.answers",
    "model.path",
    "model.vae",
    "model.network",
    "model.motion_adapter",
    "rollout.prompts",
    "rollout.decoder",
)


def resolved(run: Run, method: Method[Any]) -> Run:
    """Return ``run`` with its method and strategies as they were built, with every default."""
    return replace(
        run,
        method={**run.method, **described(method), "type": run.method["type"]},
        strategies=_strategies(run.strategies),
    )


def described(method: Method[Any]) -> dict[str, Any]:
    """Return a method's fields as in a configuration; none of a class that is no dataclass."""
    return describe(method) if is_dataclass(method) else {}


def _strategies(values: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    built = build_strategies(values)
    return tuple(
        {"type": entry["type"], **describe(strategy)} for entry, strategy in zip(values, built, strict=True)
    )


def portable(run: AnyRun) -> AnyRun:
    """Return ``run`` as its folder records it: with absolute local paths, so that it loads from any working
    directory, and without ``resume`` and ``overwrite``, which concern one start.
    """
    run = replace(run, output=str(Path(run.output).absolute()), resume=None, overwrite=False)
    for name in _FILES:
        section, _, leaf = name.partition(".")
        if hasattr(run, section):
            run = replace(run, **{section: _absolute(getattr(run, section), leaf)})
    return run if isinstance(run, RewardRun) else _with_absolute_caches(replace(run, resume_allow=()))


def files_of(run: Run | RewardRun) -> dict[str, str]:
    """Return the settings of a run that are, or may be, a file or a folder, by dotted name, without empty
    ones.
    """
    places = flatten(
        {name: getattr(run, name) for name in ("data", "model", "rollout") if hasattr(run, name)}
    )
    return {name: str(places[name]) for name in _FILES if places.get(name)}


def _with_absolute_caches(run: Run) -> Run:
    method = dict(run.method)
    if method.get("cache"):
        method["cache"] = str(Path(method["cache"]).absolute())
    noising = method.get("noising")
    if isinstance(noising, Mapping) and noising.get("cache"):
        method["noising"] = {**noising, "cache": str(Path(noising["cache"]).absolute())}
    return replace(run, method=method)


def _absolute(section: Any, leaf: str) -> Any:
    """Return a section with an absolute path in the setting ``leaf`` if it names something on this disk."""
    outer, _, inner = leaf.partition(".")
    value = getattr(section, outer)
    if inner:
        return replace(section, **{outer: _absolute(value, inner)})
    if value and "://" in value:  # an address; Path would damage it
        return section
    names_a_file = value and (Path(value).exists() or glob(value) or leaf == "cache_dir")
    return replace(section, **{outer: str(Path(value).absolute())}) if names_a_file else section


@dataclass(frozen=True)
class Resumption:
    """The comparison of a run with a checkpoint.

    Attributes:
        run: resolved.
        processes: number of ranks, or of groups that share their rows.
    """

    run: Run
    processes: int

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that a continuation must share, as dotted keys, without paths."""
        run = self.run
        return fingerprint(
            run.training,
            run.optimizer,
            self.processes,
            ignore=(*FREE, *PLACES),
            method=run.method,
            strategies=run.strategies,
            model=run.model,
            data=run.data,
            rollout=run.rollout,
        )

    def compare(self, saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
        """Return the differences that forbid resuming, without those of ``--resume.allow``.

        A checkpoint of an earlier version is converted: its method is completed with defaults, settings that
        it does not have are at their defaults, and, since it has no digests of content, its paths must be
        those of the run.

        Raises:
            UserError: ``--resume.allow`` has a name that is no setting.
        """
        allow = self.run.resume_allow
        _check_allowed(allow, {*current, *saved, *PLACES})
        run = self.run
        own = with_places(current, saved, data=run.data, model=run.model, rollout=run.rollout)
        known = _in_current_terms(saved)
        # of a constant rate no length was recorded, whatever the version
        unrecorded = LENGTH if "training.steps" not in saved else set()
        for name, value in _defaults().items():
            if name in own and name not in known and name not in unrecorded:
                known[name] = value
        # other ranks that see the same groups at each step; a round is of so many prompts of each rank
        if not run.rollout.prompts and _groups_at_once(known) == _groups_at_once(own):
            known |= {name: own[name] for name in ("processes", "training.batch_size")}
        refused = differences(known, own)
        return [text for text in refused if not is_allowed(text.partition(" is ")[0], allow)]


def with_places(current: Mapping[str, Any], saved: Mapping[str, Any], **sections: Any) -> Mapping[str, Any]:
    """Return a fingerprint with those of ``PLACES`` that a checkpoint has: an earlier version saved them, and
    no digests of content.

    Args:
        current: fingerprint of the run.
        saved: that of the checkpoint.
        **sections: of the run, by name.
    """
    places = flatten(sections)
    return {**current, **{name: places.get(name) for name in PLACES if name in saved}}


def _groups_at_once(settings: Mapping[str, Any]) -> int:
    """Return how many groups all ranks' micro-batches hold together."""
    return int(settings.get("processes", 1)) * int(settings.get("training.batch_size", 1))


def is_allowed(name: str, allow: Sequence[str]) -> bool:
    """Return whether ``--resume.allow`` has a setting: by its dotted name, its last part, or its section."""
    return any(name == one or name.startswith(f"{one}.") or name.endswith(f".{one}") for one in allow)


def _check_allowed(allow: Sequence[str], names: Iterable[str]) -> None:
    names = sorted(names)
    for one in allow:
        if one not in ("data", "model") and not any(is_allowed(name, [one]) for name in names):
            raise unknown("setting (resume.allow)", one, ["data", "model", *names])


def _in_current_terms(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved fingerprint with its method and strategies resolved, without settings that are free."""
    kept = {k: v for k, v in saved.items() if k.split(".")[0] not in ("method", "strategies")}
    kept = {k: v for k, v in kept.items() if k not in FREE}
    method = _nested({k: v for k, v in saved.items() if k.startswith("method.")}).get("method", {})
    try:
        whole = {**described(build(method)), "type": method["type"]}
        strategies = list(_strategies(saved.get("strategies", ())))
    except UserError as error:
        raise UserError(
            f"the checkpoint's method cannot be built by this version of diffalign: {error}; resume it with "
            "the version that wrote it, or start anew from its aligned model"
        ) from error
    flat = {k: v for k, v in flatten({"method": whole}).items() if k not in FREE}
    return {**kept, **flat, "strategies": strategies}


def _defaults() -> dict[str, Any]:
    run = Run()
    sections = {n: getattr(run, n) for n in ("training", "optimizer", "model", "data", "rollout")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(sections).items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, last = dotted.split(".")
        inner = tree
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def check_content(snapshot: Snapshot | None, content: Mapping[str, str], allow: Sequence[str] | None) -> None:
    """Check that a resumed run has the data and the model that its checkpoint was made with.

    Args:
        snapshot: the checkpoint; None: a fresh run.
        content: digests by name, "data" and "model".
        allow: ``--resume.allow``; None: there is no such option.

    Raises:
        UserError: a content differs that ``allow`` does not have.
    """
    for name, digest in content.items():
        saved = snapshot.content.get(name) if snapshot is not None else None
        if saved is not None and saved != digest and name not in (allow or ()):
            other = f", or, to go on with other {name}, --resume.allow {name}" if allow is not None else ""
            raise UserError(
                f"the {name} of this run are not what its checkpoint was made with: their content differs (a "
                f"moved copy would go on); allowed: the same {name}, another --output{other}"
            )


def model_content(model: LoadedModel) -> str:
    """Return a digest of a loaded pipeline: network, autoencoder, text encoders, their weights included."""
    digest = blake2b(model.fingerprint.encode(), digest_size=16)
    for part in weight_digests(model.network):
        digest.update(part)
    return digest.hexdigest()


def data_content(*sets: EncodedSet) -> str:
    """Return a digest of training and held-out data: images, prompts, labels, in order."""
    digest = blake2b(digest_size=16)
    for encoded in sets:
        digest.update(f"set {len(encoded)}".encode())
        if len(encoded) >= LARGE:
            digest.update(content_digest(encoded.records))
            continue
        for r in encoded:
            images = [image.content for image in r.images]
            labels = (r.scores, r.rewards, r.weight, r.patches, r.dense and r.dense.scores)
            fields = (r.prompt, r.texts, images, labels, *((r.time_labels,) if r.time_labels else ()))
            digest.update(repr(fields).encode(errors="surrogatepass"))
    return digest.hexdigest()


def prompts_content(prompts: Sequence[str]) -> str:
    """Return a digest of an online run's prompts, in order."""
    return blake2b(repr(list(prompts)).encode(errors="surrogatepass"), digest_size=16).hexdigest()
