"""The page of an edit: what was changed, and images of edited, related and unrelated prompts, before and
after from the same noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from diffalign.evaluation.measuring.statistics import Comparison
from diffalign.evaluation.report.embedding import tag
from diffalign.evaluation.report.page import page, section, table
from diffalign.media.files import MediaLike


@dataclass(frozen=True)
class EditGroup:
    """Images of prompts of one kind.

    Attributes:
        name: ``edited``, ``related`` or ``unrelated``.
        says: what the kind is, a sentence.
        prompts: (N,) that were drawn.
        meant: (N,) that the images after the edit are judged by: the destination of an edited prompt.
        before: (N,) images of the model before the edit.
        after: (N,) images of the edited model, from the same noise.
        moved: mean absolute difference of their pixels, 0 to 1.
        rewards: by name, after against before, both judged by ``meant``.
    """

    name: str
    says: str
    prompts: tuple[str, ...]
    meant: tuple[str, ...]
    before: tuple[MediaLike, ...] = field(repr=False)
    after: tuple[MediaLike, ...] = field(repr=False)
    moved: float
    rewards: Mapping[str, Comparison]


def edit_page(title: str, facts: Sequence[tuple[str, str]], groups: Sequence[EditGroup], shown: int) -> str:
    """Return the page, with the first ``shown`` pairs of images of each group."""
    rows = [list(row) for row in facts]
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        section("The edit", "Projections of the text, moved in closed form.", table(["", ""], rows)),
        section(
            "What changed",
            "Before and after from the same noise. Of edited prompts rewards read the destination prompt, so "
            "that a gain says that images now show it.",
            table(*summary(groups)),
        ),
    ]
    for group in groups:
        some = range(min(shown, len(group.prompts)))
        body = f'<div class="pairs">{"".join(_figure(group, i) for i in some)}</div>'
        lead = f"{group.says} {len(some)} of {len(group.prompts)} pairs are shown."
        parts.append(section(f"{group.name.capitalize()} prompts", lead, body))
    return page(title, "\n".join(parts))


def summary(groups: Sequence[EditGroup]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of all groups: pixels moved, and rewards with 95 % intervals."""
    names = list(dict.fromkeys(name for group in groups for name in group.rewards))
    head = ["prompts", "images", "pixels moved"]
    for name in names:
        head += [f"{name} before", "after", "gain, 95 % interval"]
    rows = []
    for group in groups:
        row = [group.name, str(len(group.prompts)), f"{group.moved:.3f}"]
        for name in names:
            c = group.rewards[name]
            row += [f"{c.base:.3f}", f"{c.aligned:.3f}"]
            row += [f"{c.gain.value:+.3f} [{c.gain.low:+.3f}, {c.gain.high:+.3f}]"]
        rows.append(row)
    return head, rows


def _figure(group: EditGroup, i: int) -> str:
    sides = [
        f"<div>{tag(source, f'{side}: {group.prompts[i]}')}<span>{side}</span></div>"
        for side, source in (("before", group.before[i]), ("after", group.after[i]))
    ]
    meant = "" if group.meant[i] == group.prompts[i] else f"<small>now: {escape(group.meant[i])}</small>"
    return (
        f'<figure class="pair card"><div class="images">{"".join(sides)}</div>'
        f"<figcaption>{escape(group.prompts[i])}{meant}</figcaption></figure>"
    )
