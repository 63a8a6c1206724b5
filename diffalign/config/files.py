"""Find and read configuration files, with the values of their ``base`` files. Imports no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, close_to
from diffalign.utils.text import user_path
from diffalign.utils.yaml_reader import read_yaml_file


def shipped_configs(kind: str = "") -> dict[str, Path]:
    """Return the paths of the recipes that ship with diffalign (in the wheel, or ``configs/``), by name.

    ``kind`` is the subfolder of a command other than ``train``.
    """
    package = Path(__file__).parents[1]
    folder = package / "_configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {file.stem: file for file in sorted((folder / kind).glob("*.yaml"))}


def find_config(path: str | Path, kind: str = "") -> Path:
    """Return the path of a configuration file, or of a shipped recipe.

    A recipe is named as ``name``, ``name.yaml`` or ``configs/name.yaml``; ``kind`` is as for
    ``shipped_configs``.

    Raises:
        UserError: there is no such file or recipe; it names the most similar recipes.
    """
    file = user_path(path, "config")
    if file.is_file():
        return file
    if file.is_dir():
        raise UserError(f"{path} is a folder; a config is a YAML file")
    recipes = shipped_configs(kind)
    if (
        file.parent in (Path(), Path("configs", kind))
        and file.suffix in ("", ".yaml", ".yml")
        and file.stem in recipes
    ):
        return recipes[file.stem]
    close = close_to(file.stem, recipes)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"no config file {str(path)!r}; {hint}{alike(file.stem, recipes)}")


def alike(name: str, recipes: Iterable[str]) -> str:
    """Return a list of the recipes that begin as ``name`` does, or all if there are few or none alike."""
    known = list(recipes)
    model = name.partition("_")[0].lower()
    same = [recipe for recipe in known if model and recipe.startswith(f"{model}_")]
    if len(known) <= 20:
        return f"shipped recipes: {', '.join(known)}"
    if same:
        return f"shipped recipes that begin with {model}_: {', '.join(same)}"
    real = sum(not recipe.startswith("tiny_") for recipe in known)
    return (
        f"{real} shipped recipes and {len(known) - real} for the embedded tiny models are listed by "
        "`diffalign models NAME`, with the GPUs that each is for"
    )


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over that of its ``base``.

    Raises:
        UserError: the file is unreadable, not YAML, no mapping, has a key twice, or includes itself as base.
    """
    path = path.resolve()
    if path in seen:
        raise UserError(
            f"{path}: its `base` files include each other: {' -> '.join(p.name for p in (*seen, path))}"
        )
    if not path.is_file():
        raise UserError(
            f"{seen[-1] if seen else path}: no such file {str(path)!r}" + (" (its `base`)" if seen else "")
        )
    data = read_yaml_file(path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}; a config is a mapping (`section: ...`)")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base!r}; allowed: a path relative to this file")
    return merge(read_yaml(path.parent / base, (*seen, path)), data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the nested mapping ``over`` into ``base``; an inner mapping with another ``type`` replaces it."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = value
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            # another method (or loss) starts from its own defaults, not from the old one's fields
            same = value.get("type", inner.get("type")) == inner.get("type")
            merged[key] = merge(inner, value) if same else value
    return merged
