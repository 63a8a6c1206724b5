"""A page of a preference set: the first groups as pictures, in one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from diffalign.data.reading.examples import Example, ImageRef
from diffalign.data.reading.summary import Summary
from diffalign.media.files import still
from diffalign.media.images import UNREADABLE, decode, why_unreadable, within
from diffalign.media.videos import read_video

_SIDE = 320  # pixels of a thumbnail, at most

_STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
pre { white-space: pre-wrap; background: #f4f4f4; padding: 1rem; border-radius: 6px; }
section { border-top: 1px solid #ddd; padding: 1rem 0; }
.images { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; display: block; border: 3px solid transparent; }
figure.best img { border-color: #2a7d2a; } figcaption { color: #555; font-size: 14px; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { background: #252525 } }
"""


def as_page(summary: Summary, text: str, videos: bool) -> str:
    """Return the HTML page of a set: ``text``, then each kept group with its prompt, scores and votes."""
    groups = "\n".join(_group(example, videos) for example in summary.shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(summary.name)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(summary.name)}</h1>\n<pre>{escape(text)}</pre>\n{groups}\n</body></html>\n"
    )


def _group(example: Example, videos: bool) -> str:
    best = max(example.scores) if example.scores and not example.is_tie else None
    figures = []
    for at, image in enumerate(example.images):
        score = example.scores[at] if example.scores else None
        told = [] if score is None else [f"score {score:.4g}"]
        told += [f"{example.votes[at]:.0%} of the votes"] if example.votes else []
        told += [f"prompt: {example.prompts[at]}"] if example.prompts else []
        mark = ' class="best"' if best is not None and score == best else ""
        caption = f"<figcaption>{escape(', '.join(told))}</figcaption>"
        figures.append(f"<figure{mark}>{_picture(image, videos)}{caption}</figure>")
    tie = " (a tie)" if example.is_tie else ""
    return (
        f"<section><p>{escape(example.prompt)}<br><small>{escape(example.where)}{tie}</small></p>"
        f'<div class="images">{"".join(figures)}</div></section>'
    )


def _picture(image: ImageRef, videos: bool) -> str:
    try:
        content = image.read()
        picture = still(read_video(content)) if videos else decode(content)
    except UNREADABLE as error:
        return f"<p>{escape(image.name)} is unreadable: {escape(why_unreadable(error))}</p>"
    picture = within(picture, _SIDE)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img width="{picture.width}" height="{picture.height}" alt="" src="data:image/jpeg;base64,{data}">'
    )


def as_text(summary: Summary, most: int = 6) -> str:
    """Return the numbers of a set, a line each; of sizes the ``most`` frequent ones."""
    pairs, better = summary.first_better[1], summary.first_better[0]
    lines = [
        f"{summary.name}: {summary.schema or 'preferences'}",
        f"rows: {summary.counts.text}",
        *summary.notes,
        f"sizes: {_sizes(summary, most)}",
        f"shapes: {', '.join(f'{n} {name}' for name, n in summary.aspects.items())}",
    ]
    if pairs:
        low, quarter, half, three, high = summary.margins
        share = f"{better} of {pairs} pairs ({better / pairs:.1%})"
        lines.append(f"labels: the first image is the better one in {share}")
        lines.append(
            f"margins: {low:.4g} to {high:.4g}; a quarter below {quarter:.4g}, half below {half:.4g}, three "
            f"quarters below {three:.4g}"
        )
    if summary.votes:
        lines.append(
            f"votes: {summary.votes[0]} groups, {summary.votes[1]:.1%} of the votes agree on average"
        )
    (every, different), (middle, most_words) = summary.prompts, summary.words
    lines.append(f"prompts: {every}, {different} different; words: median {middle:g}, at most {most_words}")
    for one in summary.tokens:
        limit = "no limit" if one.limit is None else f"limit {one.limit}, {one.cut} prompts are cut off"
        lines.append(f"{one.name}: at most {one.longest} tokens; {limit}")
    lines.append(f"images in several groups: {summary.repeated_images}")
    if summary.repeated_pairs:
        lines.append(
            f"pairs that an earlier row has as well: {summary.repeated_pairs}; pairs with opposite labels: "
            f"{summary.contradictions}"
        )
    lines += [f"prompts that {name} has as well: {n} of {different}" for name, n in summary.shared.items()]
    lines += [f"unreadable: {place}" for place in _some(summary.counts.skipped)]
    return "\n".join(lines)


def _sizes(summary: Summary, most: int) -> str:
    shown = ", ".join(f"{w} x {h}: {n}" for (w, h), n in summary.sizes[:most]) or "none"
    return shown + (f" and {len(summary.sizes) - most} more sizes" if len(summary.sizes) > most else "")


def _some(places: Sequence[str]) -> list[str]:
    return [*places[:5], *([f"and {len(places) - 5} more"] if len(places) > 5 else [])]
