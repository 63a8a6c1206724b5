"""The training loop around ``step = method(policy, reference, batch, generator)``.

The loss of a step is a mean over ``step.weight`` terms. Each micro-batch backpropagates ``loss * weight``,
and before clipping the gradient is divided by the total weight of the window (micro-batches and ranks). The
update is that of the mean over all terms, independently of how the batch is split and of the number of ties
per micro-batch. Gradients are synchronised once per step, in the last backward, and the host synchronises
with the device once per step, to read weight, loss and gradient norm, which decide whether the update is made
(``python -m benchmarks.host_syncs`` counts it).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.diffusion.randomness import Streams, derive, seed_torch
from diffalign.errors import Paused, UserError
from diffalign.training import optimizers
from diffalign.training.acceleration import prepare
from diffalign.training.context import group_of
from diffalign.training.ema import Ema
from diffalign.training.guard import GradientGuard, diverged
from diffalign.training.hooks import Hook, UpdateEma
from diffalign.training.interruption import Interruption
from diffalign.training.metrics import Meter
from diffalign.training.sharding import total_norm
from diffalign.training.snapshot import Snapshot
from diffalign.training.state import TrainState
from diffalign.types import Batch, Denoiser, Method, Source

# float16 loss scaling starts at 2^16 and halves at each overflow; at this scale the gradients themselves are
# not finite.
_LOWEST_LOSS_SCALE = 2.0**-10


def train(
    *,
    method: Method[Any],
    denoiser_of: Callable[[nn.Module], Denoiser],
    reference: Denoiser,
    network: nn.Module,
    parameters: Sequence[tuple[str, nn.Parameter]],
    source: Source[Any],
    settings: TrainingConfig,
    optimizer: OptimizerConfig,
    accelerator: Accelerator,
    hooks: Sequence[Hook] = (),
    resume: Snapshot | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """Train ``parameters`` of ``network`` for ``settings.steps`` optimizer steps.

    Args:
        method: the method, which computes loss and metrics of a batch.
        denoiser_of: function from the prepared network (the one that synchronises gradients) to the policy.
        reference: the reference; it may share ``network`` (with adapters off).
        network: the module that is trained, on any device.
        parameters: trained parameters by name; other parameters of ``network`` should not require gradients.
        source: source of this rank's micro-batches of ``settings.batch_size`` groups.
        settings: settings of the loop.
        optimizer: settings of the optimizer and its schedule.
        accelerator: from ``acceleration.accelerator_for``.
        hooks: called in this order before the first step, after each step and at the end.
        resume: snapshot to continue from (``Checkpoints.load``); None: a fresh run.
        kept: further tensors that hooks change (a reference that is updated), saved in checkpoints, by name.

    Returns:
        The final state; ``interrupted`` is true if a signal or the source ended the run early.

    Raises:
        TrainingDiverged: the loss or the gradient is not finite; the message has the step and its metrics.
        UserError: settings are out of range, or a snapshot has other tensors.
    """
    _check(settings, parameters)
    training_before = network.training
    prepared = prepare(accelerator, network)
    try:
        state = _begin(
            method, denoiser_of(prepared), reference, prepared, parameters,
            settings=settings, optimizer=optimizer, accelerator=accelerator,
        )  # fmt: skip
        state.kept = dict(kept or {})
        if resume is not None:
            state.restore(resume)
        source.seek(state.micro_step)
        batches = iter(source)
        hooks = [*([UpdateEma()] if state.ema else []), *hooks]
        prepared.train()
        with Interruption(announce=accelerator.is_main_process) as interruption:
            for hook in hooks:
                hook.on_start(state)
            while state.step < settings.steps and not state.interrupted:
                try:
                    _step(state, batches, interruption)
                except Paused as pause:
                    state.paused, state.interrupted = str(pause), True
                    break
                for hook in hooks:
                    hook.on_step(state)
            for hook in hooks:
                hook.on_end(state)
        return state
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # restores the network's forward
        network.train(training_before)


def _check(settings: TrainingConfig, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name in ("steps", "batch_size", "accumulation"):
        if getattr(settings, name) < 1:
            raise UserError(f"training.{name}={getattr(settings, name)}; allowed: 1 or more")
    if settings.max_grad_norm < 0:
        raise UserError(
            f"training.max_grad_norm={settings.max_grad_norm}; allowed: 0 (no clipping), or above"
        )
    if not parameters:
        raise UserError("nothing to train: the model has no trainable parameters")


def _begin(
    method: Method[Any],
    policy: Denoiser,
    reference: Denoiser,
    network: nn.Module,
    parameters: Sequence[tuple[str, nn.Parameter]],
    *,
    settings: TrainingConfig,
    optimizer: OptimizerConfig,
    accelerator: Accelerator,
) -> TrainState:
    peak = optimizers.base_learning_rate(optimizer, settings, group_of(settings, accelerator)[1])
    return TrainState(
        method=method,
        policy=policy,
        reference=reference,
        network=network,
        parameters=list(parameters),
        optimizer=optimizers.build([p for _, p in parameters], optimizer, peak),
        schedule=optimizers.Schedule(
            optimizer.schedule,
            peak,
            optimizer.warmup_steps,
            settings.steps,
            optimizer.cycles,
            optimizer.power,
        ),
        settings=settings,
        accelerator=accelerator,
        guard=GradientGuard(settings.spike_factor),
        meter=Meter(accelerator.device),
        ema=Ema(parameters, settings.ema_decay) if settings.ema_decay else None,
    )


def _step(state: TrainState, batches: Iterator[Batch[Any]], interruption: Interruption) -> None:
    """Make one optimizer step: accumulate a window, then update."""
    started = time.perf_counter()
    window = Meter(state.accelerator.device)
    sums = _accumulate(state, batches, window)
    _update(state, window, sums, interruption)
    state.optimizer.zero_grad(set_to_none=True)
    state.meter.merge(window)
    state.step += 1
    state.seconds += time.perf_counter() - started


def _accumulate(state: TrainState, batches: Iterator[Batch[Any]], window: Meter) -> Tensor:
    """Run forward and backward over one window; return this rank's total weight and weighted loss, (2,)."""
    accelerator, settings = state.accelerator, state.settings
    (rank, ranks), groups = group_of(settings, accelerator), settings.batch_size
    sums = []
    for index in range(settings.accumulation):
        batch = _next(batches, groups)
        first = (state.micro_step * ranks + rank) * groups
        generator = Streams.of_groups(settings.seed, first, batch.num_groups, batch.draws, "method")
        # Dropout inside the network is the only randomness that is not an argument.
        seed_torch(derive(settings.seed, "torch", state.micro_step, rank), accelerator.device)
        last = index + 1 == settings.accumulation
        with nullcontext() if last else accelerator.no_sync(state.network):
            result = state.method(state.policy, state.reference, batch.to(accelerator.device), generator)
            weight = result.weight.detach().to(result.loss)
            loss = result.loss * weight
            accelerator.backward(loss)
        window.add({"loss": result.loss.detach(), **result.metrics}, weight)
        sums.append(torch.stack([weight, loss.detach()]))
        state.micro_step += 1
        state.samples += len(batch.group) * ranks
    return torch.stack(sums).sum(0)


def _next(batches: Iterator[Batch[Any]], groups: int) -> Batch[Any]:
    batch = next(batches, None)
    if batch is None:
        raise ValueError("the source ended; allowed: an endless source")
    if not 1 <= batch.num_groups <= groups:
        raise ValueError(f"the source gave {batch.num_groups} groups; training.batch_size is {groups}")
    return batch


def _update(state: TrainState, window: Meter, sums: Tensor, interruption: Interruption) -> None:
    """Normalise, clip and apply the window's gradient, or skip the step; equal on all ranks."""
    accelerator, scaler = state.accelerator, state.accelerator.scaler
    if scaler is not None:
        scaler.unscale_(state.optimizer)
    gradients = [p.grad for _, p in state.parameters if p.grad is not None]
    norm = total_norm(gradients)
    local_sums = torch.cat([sums, sums.new_full((1,), float(interruption.requested))])
    global_sums = accelerator.reduce(local_sums, reduction="sum")
    total, loss, requests, raw_norm = torch.cat([global_sums, norm.reshape(1).to(global_sums)]).tolist()
    copies = state.settings.context  # the processes of a group have the same terms, which count once
    total, loss = total / copies, loss / copies

    # Gradients are averaged over ranks; this factor makes them those of the mean over all terms of all ranks.
    # The processes of a group have parts of a gradient, which the average adds up as it does those of terms.
    scale = accelerator.num_processes / total if total > 0 else 0.0
    grad_norm = raw_norm * scale
    state.interrupted, state.applied = requests > 0, False
    state.loss = loss / total if total > 0 else None
    if not math.isfinite(loss):
        raise diverged(state.step + 1, window.averages(accelerator) | {"loss": loss, "grad_norm": grad_norm})
    if total <= 0:
        state.empty_steps += 1
    elif not math.isfinite(raw_norm):
        if scaler is None or scaler.get_scale() < _LOWEST_LOSS_SCALE:
            raise diverged(state.step + 1, window.averages(accelerator) | {"grad_norm": grad_norm})
        state.overflow_steps += 1
    else:
        # a share of each process, so that a resume on another number of them weighs every step alike
        window.add({"grad_norm": grad_norm}, 1 / group_of(state.settings, accelerator)[1])
        state.applied = not state.guard.skips(grad_norm)
        state.skipped_steps += not state.applied
    if state.applied:
        _apply(state, gradients, scale, grad_norm)
    if scaler is not None:
        scaler.update()


def _apply(state: TrainState, gradients: list[Tensor], scale: float, grad_norm: float) -> None:
    limit = state.settings.max_grad_norm
    clip = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
    torch._foreach_mul_(gradients, scale * clip)
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule(state.step)
    if state.accelerator.scaler is None:
        state.optimizer.step()
    else:
        state.accelerator.scaler.step(state.optimizer)
