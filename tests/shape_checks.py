"""The type checker of the test suite: shapes are checked wherever an annotation states them.

The import hook of jaxtyping passes the functions and dataclasses of the modules of ``install`` through
``checked``. Hints that name no array are left to mypy: tests pass stand-ins for networks, pipelines and data,
and a check of each of those would say nothing about shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray


def install(modules: Sequence[str]) -> None:
    """Check the shapes of ``modules`` from their import on.

    jaxtyping wraps every function, and binds the arguments of every call; a function that states no shape
    has nothing to check and stays as it is, which matters in the loops of the plane.
    """
    wrap = jaxtyping.jaxtyped

    def where_shapes_are_stated(*, typechecker: Any) -> Callable[[Any], Any]:
        return lambda owner: wrap(owner, typechecker=typechecker) if states_shapes(owner) else owner

    jaxtyping.jaxtyped = where_shapes_are_stated
    jaxtyping.install_import_hook(modules, f"{__name__}.checked")


def states_shapes(owner: Any) -> bool:
    """Return whether a function or a dataclass has an annotation that names an array."""
    if isinstance(owner, FunctionType):
        return any(map(names_an_array, owner.__annotations__.values()))
    return is_dataclass(owner) and any(names_an_array(field.type) for field in fields(owner))


def names_an_array(hint: Any) -> bool:
    """Return whether a hint is an array of jaxtyping, or made of such."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(names_an_array(part) for part in get_args(hint))


def checked(function: Any) -> Any:
    """Return the function with its arrays checked by beartype; the function itself where it has none."""
    if not isinstance(function, FunctionType):
        return function
    shaped = {name: hint for name, hint in function.__annotations__.items() if names_an_array(hint)}
    if not shaped:
        return function
    f = function
    copy = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = f.__kwdefaults__, shaped
    copy.__qualname__, copy.__module__ = f.__qualname__, f.__module__
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(copy)
