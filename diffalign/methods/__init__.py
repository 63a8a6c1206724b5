"""Preference-optimisation methods, one paper per file: a frozen dataclass with ``__call__``, and its card.

To add a method, write ``methods/<name>.py`` with the dataclass and a ``CARD``; no other file changes.
"""

from diffalign.methods.registry import REGISTRY, MethodCard, build

__all__ = ["REGISTRY", "MethodCard", "build"]
