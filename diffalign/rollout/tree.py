"""SPO's tree: a branch of K candidates at each step, each judged, one continued at random.

SPO (Liang et al. 2024, arXiv 2406.04314) draws K candidates from one state, scores a clean estimate of each,
trains on best and worst, and continues from a candidate chosen at random, whatever the scores. In its SDXL
form each candidate takes some more steps (``inner_steps``) before it is scored; the scores then count for all
of these steps.

No prediction is computed twice: the prediction that estimates a candidate's clean image also makes its next
step, rivals with one state share a network call, and log-densities are kept from the draw. With
``estimate: parent`` (ours) the clean estimate of a candidate is made with the prediction of its parent, so
that the network is called only for the candidate that is continued. With ``estimate: none`` the noisy
candidate itself is scored, with the time that it was drawn at, by a latent reward model as in LPO (Zhang et
al. 2025, arXiv 2502.01051).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.diffusion.randomness import uniform
from diffalign.rollout.shapes import Request, Sampled, Steps, draws, pairs, start, step
from diffalign.types import Path, Random
from diffalign.utils.transfer import sent


@torch.no_grad()
def tree(request: Request, shape: Sequence[int], random: Random) -> Sampled:
    """Branches of K candidates, each judged, one continued at random. See ``trajectories``."""
    setting, policy, k = request.setting, request.policy, request.setting.samples
    steps_left = list(pairs(setting.times))
    x = start(replace(request, setting=replace(setting, shared_noise=True)), shape, random)
    for t, s in steps_left[: setting.first_branch]:
        x, _, _ = step(request, x, t, s, random, rivals=1)
    bottom = steps_left[-1][1]
    # below the lowest time nothing is trained on, and the end of the trajectory is not scored: stop here
    steps_left = [pair for pair in steps_left[setting.first_branch :] if pair[0] >= setting.lowest]
    x0, eps = request.estimates(policy, x, steps_left[0][0])
    steps, judged = Steps(request), []
    at: list[float] = []
    verdict: list[int] = []
    while steps_left:
        segment, steps_left = (steps_left[: 1 + setting.inner_steps], steps_left[1 + setting.inner_steps :])
        before = len(steps.shared)
        for number, (t, s) in enumerate(segment):
            if number:
                x0, eps = request.estimates(policy, x, t)
            mean, std = request.after(x0, eps, t, s)
            after = mean + std * draws(x, random, k)
            steps.add(x, after, mean, std, t, s)
            x = after
        verdict += [len(at)] * (len(steps.shared) - before)
        end = segment[-1][1]
        if steps_left:
            chosen = sent((uniform(random, len(x)) * k).long().clamp(max=k - 1), x.device)
        if setting.estimate == "none":
            clean, end = x, segment[-1][0]
            if steps_left:
                x = _of_each(x, chosen)
                x0, eps = request.estimates(policy, x, segment[-1][1])
        elif end == bottom:
            clean, end = x, 0.0
        elif not steps_left and setting.estimate == "candidate":
            clean, _ = request.estimates(policy, x, end)
        elif setting.estimate == "parent":
            clean = _as_parent_sees_it(policy.path, x, eps, end)
            if steps_left:
                x = _of_each(x, chosen)
                x0, eps = request.estimates(policy, x, end)
        else:
            clean, noise = request.estimates(policy, x, end)
            x, x0, eps = (_of_each(v, chosen) for v in (x, clean, noise))
        judged.append(clean)
        at.append(end)
    return steps.sampled(torch.stack(judged, 1), at, verdict)


def _of_each(value: Tensor, chosen: Tensor) -> Tensor:
    """Return (n, 1, *d): the chosen one (n,) of each prompt's candidates (n, K, *d)."""
    return value[torch.arange(len(value), device=value.device), chosen][:, None]


def _as_parent_sees_it(path: Path, x: Tensor, eps: Tensor, t: float) -> Tensor:
    """Return the clean estimate at candidates x (n, K, *d) with the noise predicted at their parent."""
    alpha, sigma = (float(c) for c in path.coefficients(torch.tensor([t], dtype=torch.float64)))
    return (x - sigma * eps) / alpha
