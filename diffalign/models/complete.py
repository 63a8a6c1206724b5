"""Check that every tensor of a component comes from its files.

transformers fills tensors that a file lacks with random numbers, and diffusers leaves them without memory;
both warn at most. A pipeline would be trained or judged with them.
"""

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffalign.errors import UserError
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)

_COMPUTED = ("position_ids",)
"""Ends of the names of buffers that are the same in every model, which older files hold and newer lack."""


@contextmanager
def complete_components() -> Iterator[None]:
    """Check each component that ``from_pretrained`` of diffusers or transformers loads in the context.

    A warning counts the tensors of the files that a component does not have.

    Raises:
        UserError: a component has tensors that its files lack; it names them.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    plain = {base: base.__dict__["from_pretrained"] for base in (ModelMixin, PreTrainedModel)}
    for base, method in plain.items():
        base.from_pretrained = _checked(method.__func__)
    try:
        yield
    finally:
        for base, method in plain.items():
            base.from_pretrained = method


def _checked(plain: Any) -> Any:
    """Return a ``from_pretrained`` with the check; the two libraries report in the same form."""

    @functools.wraps(plain)
    def from_pretrained(cls: Any, source: Any, *args: Any, **arguments: Any) -> Any:
        asked = arguments.pop("output_loading_info", False)
        model, report = plain(cls, source, *args, output_loading_info=True, **arguments)
        _check(model, report, str(source))
        return (model, report) if asked else model

    return classmethod(from_pretrained)


def _check(model: Any, report: Any, source: str) -> None:
    missing = [name for name in sorted(report["missing_keys"]) if not _is_shared(model, name)]
    if missing:
        raise UserError(
            f"{source}: tensors of {type(model).__name__} that are not in the files and would be random: "
            f"{_some(missing)} ({len(missing)} in all); allowed: complete files that fit config.json"
        )
    if left := sorted(name for name in report["unexpected_keys"] if not name.endswith(_COMPUTED)):
        logger.warning(
            "%s: tensors of the files that a %s does not have are left out: %s (%d in all)",
            source, type(model).__name__, _some(left), len(left),
        )  # fmt: skip


def _is_shared(model: Any, name: str) -> bool:
    """Whether a tensor is computed, or is the same as another one that the files may have."""
    if name.endswith(_COMPUTED):
        return True
    every = dict(model.named_parameters(remove_duplicate=False))
    return name in every and any(one is every[name] for other, one in every.items() if other != name)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
