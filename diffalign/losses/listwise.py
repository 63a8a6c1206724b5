"""Ranked lists: what swapping two of a list would cost, and the likelihood of its whole order.

``dcg_weights`` is the discounted cumulative gain that swapping a pair would cost: RankDPO (Karthik et al.
2024, arXiv 2410.18013, equations 5 to 7), after LambdaLoss (Wang et al. 2018) with the ranks of the labels in
place of the model's, so that weights are constants of the data.
``plackett_luce`` is the likelihood of an order (Plackett 1975, Luce 1959).
``adaptive_temperature`` is ADPO's.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def positions(score: Float[Tensor, " B *unit"], group: Int[Tensor, " B"]) -> Int[Tensor, " B *unit"]:
    """Rank tau of each sample among its rivals, (B, *unit): 1 is the best; of equals the earlier one is."""
    index = torch.arange(len(group))
    wide = (slice(None), slice(None)) + (None,) * (score.ndim - 1)
    same = (group[:, None] == group[None, :])[wide].to(score.device)
    earlier = (index[None, :] < index[:, None])[wide].to(score.device)
    mine, other = score[:, None], score[None, :]
    ahead = (other > mine) | ((other == mine) & earlier)
    return 1 + (same & ahead).sum(1)


def dcg_weights(
    score: Float[Tensor, " B *unit"],
    group: Int[Tensor, " B"],
    better: Int[Tensor, " P *unit"],
    worse: Int[Tensor, " P *unit"],
    log_base: float = math.e,
) -> Float[Tensor, " P *unit"]:
    """|G_i - G_j| |1 / D_i - 1 / D_j| of pairs, with gain G = 2^phi - 1 and discount D = log(1 + tau).

    Args:
        score: phi, relevance; the paper's are fractions of wins in [0, 1]. Equal scores have weight 0.
        group: who is whose rival.
        better: indices of the better ones (``Contrast.better``).
        worse: indices of the worse ones.
        log_base: of the discount: e as the paper prints it, 2 as DCG has it (weights are then ln 2 times as
            large).
    """
    gain = torch.exp2(score) - 1
    inverse_discount = math.log(log_base) / torch.log(1 + positions(score, group).to(gain))

    # advanced indexing by (P, *unit) would cross units
    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(0, index.to(values.device))

    gains = at(gain, better) - at(gain, worse)
    return (gains * (at(inverse_discount, better) - at(inverse_discount, worse))).abs()


def plackett_luce(
    reward: Float[Tensor, " B *unit"],
    score: Float[Tensor, " B *unit"],
    group: Int[Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[Tensor, " B *unit"]:
    """-log of the probability that a sample is drawn first among itself and its rivals with lower scores.

    The sum over a list without equal scores is minus the log-likelihood of its order under Plackett and
    Luce, sum_k [log sum_{j >= k} exp(s_j) - s_k] with s the rewards, best first; the last sample's term is 0.
    Rivals with equal scores do not compete, so that their order in the batch means nothing.

    Args:
        reward: s.
        score: what orders the list, higher is better.
        group: whose rival each sample is.
        smoothing: share of the label that is spread evenly over all who compete: the term becomes
            log sum_{j >= k} exp(s_j) - (1 - smoothing) s_k - smoothing mean_{j >= k} s_j.
    """
    wide = (slice(None), slice(None)) + (None,) * (score.ndim - 1)
    index = torch.arange(len(group))
    same = (group[:, None] == group[None, :])[wide].to(score.device)
    own = (index[:, None] == index[None, :])[wide].to(score.device)
    among = ((same & (score[None, :] < score[:, None])) | own).to(reward.device)
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
    """clip( tau (1 + uncertainty H + penalty (1 - H) (1 - R)), bounds ) of each list (ADPO, Wang 2025, arXiv
    2510.18913, released code).

    Args:
        tau: the base.
        entropy: H in [0, 1], how unsure the policy is.
        reward: mean reward of each list; R is its place between the least and the greatest of them, and 1/2
            where all are equal.
        uncertainty: weight of H.
        penalty: weight of sure lists that score badly.
        bounds: smallest and largest.
    """
    least, most = reward.amin(0), reward.amax(0)
    place = torch.where(most > least, (reward - least) / torch.where(most > least, most - least, 1.0), 0.5)
    factor = 1 + uncertainty * entropy + penalty * (1 - entropy) * (1 - place)
    return (tau * factor).clamp(*bounds)
