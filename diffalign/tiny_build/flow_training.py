"""The pre-training loop of all flow models: rectified flow, a moving average, resumable checkpoints.

The network regresses the velocity ``eps - x0`` at ``x_t = (1 - t) x0 + t eps``. ``t`` is logit-normal, then
shifted towards high noise, which determines the layout.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Say = Callable[[str], None]


def times(batch: int, shift: float) -> Tensor:
    """Draw times (B,) in (0, 1): logit-normal(0, 1), shifted as the scheduler shifts its grid."""
    t = torch.randn(batch).sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared error of the velocity for latents (B, ...) at times (B,).

    `predict` takes x_t and the model's time, 1000 t.
    """
    eps = torch.randn_like(x0)
    at = t.view(-1, *[1] * (x0.ndim - 1))
    return (predict((1 - at) * x0 + at * eps, 1000 * t) - (eps - x0)).square().mean()


@dataclass(frozen=True)
class Plan:
    """The settings of a pre-training.

    Attributes:
        seconds: duration in processor seconds, so that a busy machine does not change the result.
        rate: peak learning rate.
        keep: file of the checkpoint; training resumes from it if it exists.
        seed: seed of all randomness.
        decay: decay of the moving average.
        every: seconds between checkpoints.
        muon: whether to train matrices of transformer blocks with Muon.
    """

    seconds: float
    rate: float
    keep: Path | None = None
    seed: int = 0
    decay: float = 0.999
    every: float = 60.0
    muon: bool = True  # fewer steps, but slow on processors without bfloat16 instructions


def _optimizers(parts: nn.Module, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Return AdamW, and with ``muon`` also Muon for the matrices of transformer blocks.

    Muon orthogonalises the momentum; it needs 600 steps where AdamW needs 1000.
    """
    named = [(name, p) for name, p in parts.named_parameters() if p.requires_grad]
    blocks = [(name, p) for name, p in named if muon and "transformer" in name and "blocks" in name]
    matrices = [p for _, p in blocks if p.ndim == 2]
    others = [p for name, p in named if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def fit(parts: nn.Module, loss_of: Callable[[float], Tensor], plan: Plan, say: Say) -> dict[str, float]:
    """Train `parts` in one process and return figures for the report; `parts` end as their moving average.

    Args:
        parts: the networks.
        loss_of: draws a batch and returns its loss; its argument is the elapsed share of the time, in [0, 1].
        plan: the settings; the seconds of a checkpoint count towards its duration.
        say: receives lines of progress.
    """
    torch.manual_seed(plan.seed + 1)
    average = deepcopy(parts).requires_grad_(False)
    weights = [p for p in parts.parameters() if p.requires_grad]
    optimizers = _optimizers(parts, plan.rate, plan.muon)
    step, passed, recent = 0, 0.0, 0.0
    if plan.keep is not None and plan.keep.exists():
        checkpoint = torch.load(plan.keep, weights_only=True)
        parts.load_state_dict(checkpoint["parts"])
        average.load_state_dict(checkpoint["average"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, passed, recent = checkpoint["step"], checkpoint["passed"], checkpoint["recent"]
        torch.manual_seed(plan.seed + 1 + step)
    begin, saved = time.process_time() - passed, time.monotonic()
    while (done := (time.process_time() - begin) / plan.seconds) < 1:
        rate = plan.rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_of(done)
        parts.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        share = 1 - min(plan.decay, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(parts.parameters()), share)
        recent = 0.99 * recent + 0.01 * loss.item() if step > 1 else loss.item()
        passed = time.process_time() - begin
        if step % 200 == 0:
            say(f"step {step} loss {recent:.4f} {passed:.0f} s of {plan.seconds:.0f}")
        if plan.keep is not None and time.monotonic() - saved > plan.every:
            saved = time.monotonic()
            state = {"parts": parts.state_dict(), "average": average.state_dict()}
            state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"step": step, "passed": passed, "recent": recent}
            fresh = plan.keep.with_suffix(".fresh")
            torch.save(state, fresh)
            fresh.replace(plan.keep)
    parts.load_state_dict(average.state_dict())
    return {"steps": step, "seconds": round(passed, 1), "loss": round(recent, 4)}
