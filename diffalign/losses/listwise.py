"""Losses and weights of ranked lists.

``dcg_weights`` is the change of the discounted cumulative gain if two members of a list are swapped: RankDPO
(Karthik et al. 2024, arXiv 2410.18013, equations 5 to 7), after LambdaLoss (Wang et al. 2018), with the ranks
of the labels in place of the model's, so that weights are constants of the data. ``plackett_luce`` is the
negative log-likelihood of an order (Plackett 1975, Luce 1959). ``adaptive_temperature`` is ADPO's.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def positions(score: Float[Tensor, " B *unit"], group: Int[Tensor, " B"]) -> Int[Tensor, " B *unit"]:
    """Return the rank of each sample among its rivals, (B, *unit); 1 is the best, ties are in batch order."""
    index = torch.arange(len(group))
    wide = (slice(None), slice(None)) + (None,) * (score.ndim - 1)
    same = (group[:, None] == group[None, :])[wide].to(score.device, non_blocking=True)
    earlier = (index[None, :] < index[:, None])[wide].to(score.device, non_blocking=True)
    score_i, score_j = score[:, None], score[None, :]
    better_rival = (score_j > score_i) | ((score_j == score_i) & earlier)
    return 1 + (same & better_rival).sum(1)


def dcg_weights(
    score: Float[Tensor, " B *unit"],
    group: Int[Tensor, " B"],
    better: Int[Tensor, " P *unit"],
    worse: Int[Tensor, " P *unit"],
    log_base: float = math.e,
) -> Float[Tensor, " P *unit"]:
    """Return |G_i - G_j| |1 / D_i - 1 / D_j| of pairs, with gain G = 2^phi - 1 and discount D = log(1 + tau).

    Args:
        score: relevance phi; in the paper fractions of wins in [0, 1]. Pairs with equal scores have weight 0.
        group: group ids, equal for rivals.
        better: indices of the better samples (``Contrast.better``).
        worse: indices of the worse samples.
        log_base: base of the discount's logarithm: e as in the paper, 2 as in DCG (which multiplies the
            weights by ln 2).
    """
    gain = torch.exp2(score) - 1
    inverse_discount = math.log(log_base) / torch.log(1 + positions(score, group).to(gain))

    # gather keeps units apart; indexing by (P, *unit) would not
    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(0, index.to(values.device, non_blocking=True))

    gains = at(gain, better) - at(gain, worse)
    return (gains * (at(inverse_discount, better) - at(inverse_discount, worse))).abs()


def plackett_luce(
    reward: Float[Tensor, " B *unit"],
    score: Float[Tensor, " B *unit"],
    group: Int[Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[Tensor, " B *unit"]:
    """Return -log of the probability that a sample is drawn before its rivals with lower scores, (B, *unit).

    The sum over a list without equal scores is the negative log-likelihood of its order under Plackett and
    Luce, sum_k [log sum_{j >= k} exp(s_j) - s_k] with s the rewards, best first; the last sample's term is 0.
    Rivals with equal scores are left out of each other's sums, so that their order in the batch has no
    effect.

    Args:
        reward: rewards s.
        score: scores that order the list, higher is better.
        group: group ids, equal for rivals.
        smoothing: share of the label that is spread evenly over the samples of the sum; the term becomes
            log sum_{j >= k} exp(s_j) - (1 - smoothing) s_k - smoothing mean_{j >= k} s_j.
    """
    wide = (slice(None), slice(None)) + (None,) * (score.ndim - 1)
    index = torch.arange(len(group))
    same = (group[:, None] == group[None, :])[wide].to(score.device, non_blocking=True)
    itself = (index[:, None] == index[None, :])[wide].to(score.device, non_blocking=True)
    among = ((same & (score[None, :] < score[:, None])) | itself).to(reward.device)
    label = reward
    if smoothing:
        mean = torch.where(among, reward[None, :], 0.0).sum(1) / among.sum(1)
        label = (1 - smoothing) * reward + smoothing * mean
    return torch.where(among, reward[None, :], -torch.inf).logsumexp(1) - label


def adaptive_temperature(
    tau: float,
    entropy: Float[Tensor, " G *unit"],
    reward: Float[Tensor, " G *unit"],
    *,
    uncertainty: float,
    penalty: float,
    bounds: tuple[float, float],
) -> Float[Tensor, " G *unit"]:
    """Return the temperature of each list, clip(tau (1 + uncertainty H + penalty (1 - H) (1 - R)), bounds).

    Source: ADPO, Wang 2025, arXiv 2510.18913, released code.

    Args:
        tau: base temperature.
        entropy: normalised entropy H of the policy's list, in [0, 1].
        reward: mean reward of each list; R is the mean reward rescaled to [0, 1] by the smallest and the
            largest of the batch, and 1/2 if all are equal.
        uncertainty: weight of H.
        penalty: weight of lists with low entropy and low reward.
        bounds: smallest and largest temperature.
    """
    least, most = reward.amin(0), reward.amax(0)
    rescaled = torch.where(most > least, (reward - least) / torch.where(most > least, most - least, 1.0), 0.5)
    factor = 1 + uncertainty * entropy + penalty * (1 - entropy) * (1 - rescaled)
    return (tau * factor).clamp(*bounds)
