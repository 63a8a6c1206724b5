"""A whole run: load the model, encode the preferences once, train, write weights that plain diffusers loads.

    from diffalign import Run, align
    align(Run(output="runs/mine", model=ModelConfig(path="..."), data=DataConfig(path="pairs.parquet")))

The run directory holds ``config.yaml`` (loads again), ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``checkpoints/``, ``cache/``, ``aligned/`` with its model card, and ``summary.json``.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.config.io import typed
from diffalign.config.schema import ModelConfig, Run
from diffalign.data import Preferences, check_files, read_preferences
from diffalign.data.encoding.geometry import size_of
from diffalign.data.reading.drop import rows_in
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.spans import span_of
from diffalign.diffusion.times import fitted
from diffalign.errors import UserError
from diffalign.export.adapters import attach_carried
from diffalign.export.aligned import save_aligned
from diffalign.export.card import Card
from diffalign.methods import build
from diffalign.methods._common import OverStates
from diffalign.models.dropout import switch_off_dropout
from diffalign.models.formulation import check_trained
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import check_targets
from diffalign.models.precision import AUTOCAST
from diffalign.models.text_lora import begin_training_text
from diffalign.runs.folder import begin, record
from diffalign.runs.idle_settings import tell_of_length, tell_of_settings
from diffalign.runs.launcher import with_launcher
from diffalign.runs.memory_advice import when_loading, when_training
from diffalign.runs.micro_batch import takes_both_experts
from diffalign.runs.model_card import card_of
from diffalign.runs.online_checks import check_online
from diffalign.runs.publish import push
from diffalign.runs.resume import Resumption, check_content, model_content, resolved
from diffalign.runs.role_checks import check_roles
from diffalign.runs.schedule import Forecast, announcement, scheduled
from diffalign.runs.scores import check_online_scores, check_reward_range
from diffalign.runs.setup import offline, online
from diffalign.runs.streaming import check_streaming, streamed
from diffalign.runs.validate import validate
from diffalign.strategies import wrap
from diffalign.training.acceleration import Accelerator, accelerator_for, set_products
from diffalign.training.checkpoint import Checkpoints
from diffalign.training.context import group_of
from diffalign.training.hooks import standard_hooks
from diffalign.training.loop import train
from diffalign.training.optimizers import check_device
from diffalign.training.packages import check_packages
from diffalign.training.state import TrainState
from diffalign.types import Method
from diffalign.utils.devices import share
from diffalign.utils.files import write_atomic
from diffalign.utils.lock import locked
from diffalign.utils.memory import Peak, advised, peak_memory


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        output: the run directory.
        aligned: ``output/aligned``, or None if the run was interrupted.
        steps: total optimizer steps.
        seconds: training time, including that before an interruption.
        interrupted: whether a signal has stopped the run early; ``resume: latest`` continues it.
        counts: a sentence on the contents of the preference set.
        verdict: a sentence on the held-out pairs, or on the rewards of the rounds.
        waiting: what an online run needs before it can continue, such as labels; empty for others.
        memory: the peak.
        loading: the lines of Python that load ``aligned`` with plain diffusers.
    """

    output: Path
    aligned: Path | None
    steps: int
    seconds: float
    interrupted: bool
    counts: str
    verdict: str
    waiting: str = ""
    memory: Peak = Peak(0, "main memory")
    loading: tuple[str, ...] = ()


def align(run: Run, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Result:
    """Run ``run``; ``say`` gets a line at each stage, on the first process.

    Raises:
        TypeError: ``run`` is no ``Run``.
        UserError: anything wrong with the configuration, model or data, as early as it can be known.
    """
    if not isinstance(run, Run):
        example = 'read_run("sdxl_dpo_lora_24gb", ["--data.path", "pairs.parquet"])'
        raise TypeError(f"run is a {type(run).__name__}; allowed: a Run, such as {example}")
    rank, _ = share()
    tell = say if rank == 0 else _silent  # there is no accelerator before the run is known to be right
    run = with_launcher(typed(run), tell)
    validate(run)
    quantized = {
        "model.quantize": run.model.quantize,
        "model.text_encoder.quantize": run.model.text_encoder.quantize,
    }
    check_packages(run.logging.trackers, run.optimizer.type, quantized)
    inner = build(run.method)
    run = resolved(run, inner)
    method = wrap(inner, run.strategies)
    check_roles(run, method)
    prompts = check_online(run)
    if prompts:
        check_online_scores(inner, run.rollout)
    else:
        check_reward_range(inner, run.data)
    if not prompts:
        check_streaming(run, inner)
    preferences = None if prompts else read_preferences(run.data, run.training.seed)
    if preferences is not None:
        if run.data.drop is not None:
            rows_in(run.data.drop)
        check_files(preferences, run.data, tell)
    accelerator = accelerator_for(run.training)
    tell = say if accelerator.is_main_process else _silent
    check_device(run.optimizer.type, accelerator.device)
    if products := set_products(run.training.float32_matmul, accelerator.device.type):
        tell(products)
    output = Path(run.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output={run.output!r} is a file; allowed: a folder, new or of a run to resume")
    with locked(output) if accelerator.is_main_process else nullcontext():
        return _aligned(run, prompts, preferences, accelerator, tell)


def _silent(line: str) -> None:
    """Say nothing: processes other than the first."""


def _aligned(
    run: Run,
    prompts: Sequence[str],
    preferences: Preferences | None,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> Result:
    """Run ``run``, resolved and checked, in an output folder that no other process writes."""
    output, inner = Path(run.output), build(_own_trajectories(run))
    method = wrap(inner, run.strategies)
    checkpoints = _checkpoints(run, output, accelerator, tell)
    snapshot = begin(run, checkpoints, accelerator, tell)
    tell_of_settings(run, inner, tell)
    model = _loaded(run, inner, accelerator, tell, online=bool(prompts))
    if encoders := begin_training_text(model, run.model):
        tell(
            f"text: {' and '.join(encoders)} trained with LoRA; the cache holds tokens in place of embeddings"
        )
    checkpoints.content["model"] = model_content(model)
    if not run.model.dropout and (layers := switch_off_dropout(model.network)):
        tell(f"dropout: {layers} layers of the network have it, switched off (model.dropout true keeps it)")
    if preferences is None:
        setup = online(run, model, method, accelerator, fresh=snapshot is None, tell=tell, prompts=prompts)
    else:
        setup = (streamed if run.data.stream_block else offline)(
            run, model, inner, method, preferences=preferences, accelerator=accelerator, tell=tell
        )
    checkpoints.content["data"] = setup.content
    check_content(snapshot, checkpoints.content, run.resume_allow)
    _, processes = group_of(run.training, accelerator)
    settings = scheduled(run.training, setup.groups, processes)
    tell_of_length(run, settings, tell)
    tell(announcement(settings, setup.groups, processes, snapshot.step if snapshot else 0))
    record(run, accelerator)
    roles = setup.roles
    hooks = [*setup.hooks, *roles.hooks, Forecast(tell)]
    with closing(setup), advised("training", when_training(run)):
        state = train(
            method=method,
            denoiser_of=roles.policy_of,
            reference=roles.reference,
            network=roles.network,
            parameters=roles.parameters,
            source=setup.source,
            settings=settings,
            optimizer=run.optimizer,
            accelerator=accelerator,
            hooks=standard_hooks(output, run.logging, run.checkpoint, checkpoints, hooks, asdict(run)),
            resume=snapshot,
            kept=roles.kept,
        )
    result = Result(
        output=output,
        aligned=None if state.interrupted else output / "aligned",
        steps=state.step,
        seconds=state.seconds,
        interrupted=state.interrupted,
        counts=setup.counts,
        verdict=setup.outcome.verdict,
        waiting=state.paused,
        memory=peak_memory(),
    )
    figures = setup.outcome.figures
    about = {"optimizer steps": str(result.steps), "peak memory": result.memory.text, "data": result.counts}
    card = card_of(run, model, about, figures, result.verdict)
    _leave(result, run, model, state, figures, card)
    if accelerator.is_main_process and result.aligned is not None:
        _publish(run, tell)
    accelerator.wait_for_everyone()
    return replace(result, loading=tuple(card.loading(str(output / "aligned"))))


def _loaded(
    run: Run, inner: Method[Any], accelerator: Accelerator, tell: Callable[[str], None], *, online: bool
) -> LoadedModel:
    """Load the model that is trained; of two experts one, unless samples are drawn, which take both."""
    # offline the encoders have the accelerator to themselves until all is encoded
    resting, compute = None if online else "cpu", AUTOCAST[run.training.mixed_precision]
    with advised("loading the model", when_loading(run)):
        alone = not takes_both_experts(run)
        model = load(run.model, accelerator.device, compute, resting, trained=True, alone=alone)
    check_trained(run.model, model.pipeline.scheduler)
    if run.model.train == "lora":  # raises before anything is encoded
        check_targets(model.network, run.model.lora.targets)
    tell(f"model: {run.model.path} ({model.family.name}), {run.model.train}, on {accelerator.device.type}")
    if model.split:
        low, high = span_of(model.path)
        tell(f"expert: {run.model.expert} noise, {model.family.network_name}, times {low:g} to {high:g}")
        attach_carried(model)
        if isinstance(inner, OverStates):  # raises before anything is encoded
            fitted(inner.time, model.path, model.latent_shape(*size_of(run.data), run.data.frames or 1))
    return model


def _publish(run: Run, tell: Callable[[str], None]) -> None:
    """Put the finished run on the hub, where its export section names a repository."""
    hub = run.export
    if hub.push_to_hub:
        address = push(run.output, hub.push_to_hub, private=hub.private, revision=hub.revision, say=tell)
        tell(f"on the hub: {address}")


_OF_THE_BASE = (
    "family", "prediction", "zero_terminal_snr", "network", "expert", "adapter", "motion_adapter",
    "embedded_guidance", "quantize",
)  # fmt: skip
"""Settings of a model, beside its place and dtype, that change what the base predicts."""


def _own_trajectories(run: Run) -> Mapping[str, Any]:
    """Return the method section with a cache folder for this base model: cached inversions are named by what
    was inverted, not by the model.

    Raises:
        UserError: the reference moves, so that cached inversions would be wrong.
    """
    section = dict(run.method)
    noising = section.get("noising")
    holder = section if section.get("cache") else dict(noising) if isinstance(noising, Mapping) else {}
    if not holder.get("cache"):
        return run.method
    if run.training.reference_every:
        raise UserError(
            f"method cache={holder['cache']!r} with training.reference_every={run.training.reference_every}: "
            "a reference that moves inverts anew; allowed: one of them"
        )
    model, usual = run.model, ModelConfig()
    others = [f"{n}={v}" for n in _OF_THE_BASE if (v := getattr(model, n)) != getattr(usual, n)]
    whose = derive(0, model.path, str(model.revision), str(model.variant), model.dtype, *others)
    holder["cache"] = str(Path(holder["cache"]) / f"{whose:016x}")
    return holder if section.get("cache") else {**section, "noising": holder}


def _checkpoints(
    run: Run, output: Path, accelerator: Accelerator, tell: Callable[[str], None]
) -> Checkpoints:
    """Return the run's checkpoints."""
    resumption = Resumption(run, group_of(run.training, accelerator)[1])
    return Checkpoints(
        output / "checkpoints", run.checkpoint.limit, resumption.settings, resumption.compare, tell=tell
    )


def _leave(
    result: Result,
    run: Run,
    model: LoadedModel,
    state: TrainState,
    held_out: Mapping[str, float],
    card: Card,
) -> None:
    """Write ``aligned/`` with its card, and the summary, on the first process. A collective."""
    with state.whole_weights() as writes:
        if writes and result.aligned is not None:
            save_aligned(model, result.aligned, card.text())
    if not writes:
        return
    summary = {
        "method": run.method["type"],
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        "peak_memory_gib": round(result.memory.gib, 3),
        "peak_memory_of": result.memory.of,
        "interrupted": result.interrupted,
        "data": result.counts,
        "verdict": result.verdict,
        "held_out": dict(held_out),
        "skipped_steps": state.skipped_steps,
        "empty_steps": state.empty_steps,
        "versions": dict(card.versions),
    }
    write_atomic(result.output / "summary.json", json.dumps(summary, indent=2))
