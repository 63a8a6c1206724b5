"""Rewards by their Python import path: ``my_module:MyReward``, ``package.module:function``.

Three forms are accepted, told apart by the signature:

- a function of images and prompts, ``(images, prompts) -> (B,)``, is the reward itself;
- a class or a factory without required parameters is called once, with those of ``device``, ``dtype`` and
  ``batch_size`` that it takes by name, and gives the reward;
- any other object that is callable is the reward.

``images`` are B PIL images (or pixels (B, 3, H, W) in [0, 1]); of an object with ``video = True`` they are B
``Video``s. ``low`` and ``high``, where the object has them, are its usual scores. The module is looked for
where Python looks, and in the working folder. Scores are never cached: nothing tells when the code changes.
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
    """Return whether a spec has the form of an import path whose module can be found; nothing is imported
    but the packages that hold it.
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
    """Return the card of a reward by its import path.

    Raises:
        UserError: the module cannot be imported, or has no such callable.
    """
    found = _attribute(spec)
    low, high = (getattr(found, name, None) for name in ("low", "high"))
    known = all(isinstance(end, int | float) for end in (low, high))
    return RewardCard(
        name=spec.partition(":")[2],
        title=(inspect.getdoc(found) or f"the reward {spec}").splitlines()[0],
        low=float(low) if known and low is not None else None,
        high=float(high) if known and high is not None else None,
        licence="its author's",
        size="unknown",
        checkpoint=spec,
        target="diffalign.rewards.imported:load",
        notes=f"A reward of one's own, imported as {spec}.",
        cached=False,
        video=getattr(found, "video", False) is True,
    )


@dataclass(frozen=True)
class ImportedReward:
    """A reward of one's own; its scores are checked and made float32.

    Attributes:
        spec: its import path.
        function: images and prompts to B numbers: a tensor, an array or a list.
        batch_size: images at once.
    """

    spec: str
    function: Callable[[Any, list[str]], Any]
    batch_size: int = 16

    def __call__(self, images: Any, prompts: Sequence[str]) -> "Tensor":
        """(B,) float32; UserError for an answer that is not B numbers."""
        import torch

        parts = []
        for start in range(0, len(prompts), self.batch_size):
            some = list(prompts[start : start + self.batch_size])
            parts.append(self._scores(images[start : start + self.batch_size], some))
        return torch.cat(parts) if parts else torch.zeros(0)

    def _scores(self, images: Any, prompts: list[str]) -> "Tensor":
        import torch

        answer = self.function(images, prompts)
        try:
            scores = torch.as_tensor(answer).float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"reward {self.spec!r} gives {str(answer)[:60]!r}; allowed: numbers") from error
        if scores.shape != (len(prompts),):
            raise UserError(
                f"reward {self.spec!r} gives scores of shape {tuple(scores.shape)} for {len(prompts)} "
                "images; allowed: one number an image"
            )
        return scores


def load(source: str | None, place: Place) -> "Reward":
    """Return the reward of an import path (``source``), as the module's docstring says.

    Raises:
        UserError: the class or factory cannot be called, or gives nothing that can be.
    """
    assert source is not None  # registry.parse gives the spec
    found = _attribute(source)
    required = _required(found, source)
    if not inspect.isclass(found) and (required or not inspect.isroutine(found)):
        return ImportedReward(source, found, place.batch_size)
    if required:
        raise UserError(
            f"reward {source!r}: {found.__name__} needs {', '.join(required)}; allowed: a class without "
            "required parameters, beside device, dtype and batch_size"
        )
    options = {name: getattr(place, name) for name in ("device", "dtype", "batch_size")}
    taken = inspect.signature(found).parameters
    made = found(**{name: value for name, value in options.items() if name in taken})
    if not callable(made):
        raise UserError(f"reward {source!r} makes a {type(made).__name__}; allowed: something callable")
    return ImportedReward(source, made, place.batch_size)


def _required(found: Callable[..., Any], spec: str) -> list[str]:
    """Return the names of the parameters without defaults, less those that ``load`` gives."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {spec!r}: its parameters cannot be read ({error})") from error
    given = ("device", "dtype", "batch_size")
    return [
        p.name for p in parameters if p.default is _EMPTY and p.kind in _POSITIONAL and p.name not in given
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
    found = getattr(loaded, name, None)
    if not callable(found):
        names = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise UserError(
            f"reward {spec!r}: {module} has no class or function {name!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    return found


def _with_working_folder(module: str) -> None:
    """Let Python find modules in the working folder, as it does for scripts there, where one is named."""
    top, folder = module.partition(".")[0], Path.cwd()
    here = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    if here and str(folder) not in sys.path:
        sys.path.append(str(folder))
