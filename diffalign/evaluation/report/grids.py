"""Images side by side: for the report (base64), for a README (one PNG, of videos a frame)."""

import base64
import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from diffalign.media.files import MediaLike, still
from diffalign.media.images import within

TINY = 128  # images of at most this side are magnified by whole pixels
_GROUND, _INK, _SOFT = "#ffffff", "#1d2126", "#5c6570"


def embed(image: Image.Image, side: int = 448) -> tuple[str, bool]:
    """Return a data URI of the image and whether it is tiny: PNG if tiny, else JPEG of at most ``side``
    pixels.
    """
    image, buffer = image.convert("RGB"), io.BytesIO()
    tiny = max(image.size) <= TINY
    if tiny:
        image.save(buffer, format="PNG", optimize=True)
    else:
        within(image, side).save(buffer, format="JPEG", quality=86, optimize=True)
    return (
        f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        tiny,
    )


def grid_image(
    base: Sequence[MediaLike],
    aligned: Sequence[MediaLike],
    prompts: Sequence[str],
    *,
    base_scores: Sequence[float] | None = None,
    aligned_scores: Sequence[float] | None = None,
    columns: int = 3,
    side: int = 160,
    titles: tuple[str, str] = ("base", "aligned"),
) -> Image.Image:
    """One picture of N pairs, ``columns`` in a row: base left, aligned right, scores and prompt below.

    Images are brought to ``side`` pixels, tiny ones without smoothing. ValueError if the counts differ.
    """
    if not len(base) == len(aligned) == len(prompts) or not prompts:
        raise ValueError(f"{len(base)} base images, {len(aligned)} aligned images and {len(prompts)} prompts")
    margin, gap, head, line = 20, 6, 26, 18
    text, bold = ImageFont.load_default(size=13), ImageFont.load_default(size=14)
    width = 2 * side + gap
    wraps = [textwrap.wrap(prompt, max(12, width // 7))[:3] or [""] for prompt in prompts]
    scored = base_scores is not None and aligned_scores is not None
    below = line * (max(map(len, wraps)) + scored) + 10
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    size = (columns * (width + margin) + margin, rows * (side + below + margin) + margin + head)
    sheet = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(sheet)
    for i, (before, after, words) in enumerate(zip(base, aligned, wraps, strict=True)):
        left = margin + (i % columns) * (width + margin)
        top = margin + head + (i // columns) * (side + below + margin)
        for k, source in enumerate((before, after)):
            x = left + k * (side + gap)
            sheet.paste(_fit(still(source), side), (x, top))
            if i < columns:
                pen.text((x, margin), titles[k], fill=_INK, font=bold)
        y = top + side + 6
        if base_scores is not None and aligned_scores is not None:
            pen.text((left, y), f"{base_scores[i]:.2f}", fill=_SOFT, font=text)
            pen.text((left + side + gap, y), f"{aligned_scores[i]:.2f}", fill=_SOFT, font=text)
            y += line
        for word in words:
            pen.text((left, y), word, fill=_INK, font=text)
            y += line
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Return the image on a square of ``side``, its long side filling it."""
    scale = side / max(image.size)
    how = Image.Resampling.NEAREST if max(image.size) <= TINY and scale >= 1 else Image.Resampling.LANCZOS
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)
    square = Image.new("RGB", (side, side), "#e4e1dc")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square
