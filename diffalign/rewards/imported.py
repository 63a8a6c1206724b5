"""Rewards from user code, by Python import path: ``my_module:MyReward``, ``package.module:function``.

Three forms are accepted; the signature decides which one applies:

- a function of images and prompts, ``(images, prompts) -> (B,)``, is the reward itself;
- a class or factory without required parameters is called once and returns the reward; it is passed those of
  ``device``, ``dtype`` and ``batch_size`` that its signature names;
- any other callable object is the reward.

``images`` are B PIL images, or pixels (B, 3, H, W) in [0, 1]; for an object with ``video = True`` they are B
``Video``s. The attributes ``low`` and ``high``, if present, give the usual range of scores. The module is
searched on ``sys.path`` and in the working folder. Scores are never cached, since a change of the code cannot
be detected.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError
from diffalign.rewards.cards import RewardCard
from diffalign.rewards.place import Place

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.types import Reward

_NAME = r"[A-Za-z_]\w*"
_PATH = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME})")
_EMPTY = inspect.Parameter.empty
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def is_import_path(spec: str) -> bool:
    """Return whether a spec has the form of an import path and its module can be target.

    The module itself is not imported, but its parent packages are.
    """
    match = _PATH.fullmatch(spec)
    if match is None:
        return False
    _with_working_folder(match[1])
    try:
        return importlib.util.find_spec(match[1]) is not None
    except (ImportError, ValueError):
        return False


def imported_card(spec: str) -> RewardCard:
    """Return the card of the reward at an import path.

    Raises:
        UserError: the module cannot be imported, or has no such callable.
    """
    target = _attribute(spec)
    low, high = (getattr(target, name, None) for name in ("low", "high"))
    known = all(isinstance(end, int | float) for end in (low, high))
    return RewardCard(
        name=spec.partition(":")[2],
        title=(inspect.getdoc(target) or f"the reward {spec}").splitlines()[0],
        low=float(low) if known and low is not None else None,
        high=float(high) if known and high is not None else None,
        licence="its author's",
        size="unknown",
        checkpoint=spec,
        target="diffalign.rewards.imported:load",
        notes=f"A reward of one's own, imported as {spec}.",
        cached=False,
        video=getattr(target, "video", False) is True,
    )


@dataclass(frozen=True)
class ImportedReward:
    """A reward from user code; its scores are checked and converted to float32.

    Attributes:
        spec: the import path.
        function: maps images and prompts to B numbers (a tensor, an array or a list).
        batch_size: images a call.
    """

    spec: str
    function: Callable[[Any, list[str]], Any]
    batch_size: int = 16

    def __call__(self, images: Any, prompts: Sequence[str]) -> "Tensor":
        """Return scores (B,), float32.

        Raises:
            UserError: ``function`` did not return B numbers.
        """
        import torch

        parts = []
        for start in range(0, len(prompts), self.batch_size):
            end = start + self.batch_size
            parts.append(self._scores(images[start:end], list(prompts[start:end])))
        return torch.cat(parts) if parts else torch.zeros(0)

    def _scores(self, images: Any, prompts: list[str]) -> "Tensor":
        import torch

        result = self.function(images, prompts)
        try:
            scores = torch.as_tensor(result).float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"reward {self.spec!r} gives {str(result)[:60]!r}; allowed: numbers") from error
        if scores.shape != (len(prompts),):
            raise UserError(
                f"reward {self.spec!r} gives scores of shape {tuple(scores.shape)} for {len(prompts)} "
                "images; allowed: one number an image"
            )
        return scores


def load(source: str | None, place: Place) -> "Reward":
    """Return the reward at the import path ``source``; the module docstring lists the accepted forms.

    Raises:
        UserError: the class or factory has required parameters, or its result is not callable.
    """
    assert source is not None  # registry.parse gives the spec
    target = _attribute(source)
    required = _required(target, source)
    if not inspect.isclass(target) and (required or not inspect.isroutine(target)):
        return ImportedReward(source, target, place.batch_size)
    if required:
        raise UserError(
            f"reward {source!r}: {target.__name__} needs {', '.join(required)}; allowed: a class without "
            "required parameters, beside device, dtype and batch_size"
        )
    options = {name: getattr(place, name) for name in ("device", "dtype", "batch_size")}
    accepted = inspect.signature(target).parameters
    reward = target(**{name: value for name, value in options.items() if name in accepted})
    if not callable(reward):
        raise UserError(f"reward {source!r} makes a {type(reward).__name__}; allowed: something callable")
    return ImportedReward(source, reward, place.batch_size)


def _required(target: Callable[..., Any], spec: str) -> list[str]:
    """Return the names of the positional parameters without defaults, except those that ``load`` passes."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {spec!r}: its parameters cannot be read ({error})") from error
    passed = ("device", "dtype", "batch_size")
    return [
        p.name for p in parameters if p.default is _EMPTY and p.kind in _POSITIONAL and p.name not in passed
    ]


def _attribute(spec: str) -> Callable[..., Any]:
    module, _, name = spec.partition(":")
    _with_working_folder(module)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"reward {spec!r}: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    target = getattr(loaded, name, None)
    if not callable(target):
        names = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise UserError(
            f"reward {spec!r}: {module} has no class or function {name!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    return target


def _with_working_folder(module: str) -> None:
    """Append the working folder to ``sys.path`` if it holds this module, as Python does for scripts."""
    top, folder = module.partition(".")[0], Path.cwd()
    here = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    if here and str(folder) not in sys.path:
        sys.path.append(str(folder))
