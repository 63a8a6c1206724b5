"""The layout of one table: which of its columns are read, and as what."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.data.reading.cells import cell
from diffalign.data.reading.labels import Label
from diffalign.data.reading.schemas import Schema


@dataclass(frozen=True)
class Layout:
    """The schema of one table.

    Attributes:
        schema: which.
        prompt: the prompt's column.
        label: how the label is read.
        mapped: (role, column) of ``data.columns``.
        found: all columns of the table, with prototypes of their values ("" text, b"" bytes, 0 numbers).
        source: the source image's column, or the path to it; "": rows have none.
    """

    schema: Schema
    prompt: str
    label: Label
    mapped: tuple[tuple[str, str], ...]
    found: Mapping[str, Any]
    source: str = ""

    @property
    def videos(self) -> bool:
        """Whether the columns hold videos."""
        return bool(self.schema.video)

    @property
    def used(self) -> set[str]:
        """Columns of the table that are read, at the top level."""
        group = (self.schema.group,) if self.schema.group else ()
        inputs = tuple(name for name in (self.schema.inputs, self.source) if name)
        altered = ("altered",) if self.schema.altered else ()
        names = {self.prompt, *self.schema.files.columns, *self.label.columns, *self.label.optional, *group}
        names |= {*self.schema.extras, *self.schema.needs, *inputs, *altered}
        roles = dict(self.mapped)
        tops = {roles.get(name, name) for name in names}
        tops = {name if name in self.found else name.partition(".")[0] for name in tops}
        if ratings := getattr(self.schema.files, "ratings", None):
            of_models = self.found.get(ratings)
            tops |= set(of_models) if isinstance(of_models, Mapping) else set(self.found)
        return tops & set(self.found)

    @property
    def unused(self) -> list[str]:
        """Columns with a name that hold texts, files or nested values and are not read."""
        used = self.used
        return sorted(
            name
            for name, value in self.found.items()
            if name and name not in used and isinstance(value, str | bytes | Mapping | list | tuple)
        )

    def named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row with its columns under the names of their roles."""
        return {**row, **{role: cell(row, path) for role, path in self.mapped}} if self.mapped else row
