"""Strategies: additions that compose with any method. A wrapped method is a method.

To add one, write ``strategies/<name>.py`` with a frozen dataclass that has ``wrap(method) -> method``, and a
``CARD``; no other file changes. In a configuration:

    strategies:
      - {type: sdpo, mu: 0.9}
      - {type: sft, weight: 0.1}

The first of the list is the innermost. Most strategies change the gradient only, by wrapping the policy
(``strategies._common.Scaled``). Held-out diagnostics measure the method without its strategies.
"""

from diffalign.strategies.registry import STRATEGIES, StrategyCard, build, wrap

__all__ = ["STRATEGIES", "StrategyCard", "build", "wrap"]
