"""The style of the report, and the frame of a self-contained HTML page."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from diffalign.evaluation.report.script import SCRIPT

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d2126; --soft: #5c6570;
  --rule: #e4e1dc; --base: #8a94a3; --aligned: #0f766e; --good: #0f766e; --bad: #b4432f; --even: #8a94a3;
  --warn: #fdf3e1; --warn-ink: #74470b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --card: #1c2024; --ink: #e9ebee; --soft: #a3adb8; --rule: #30363d; --base:
    #7f8a99; --aligned: #38bdaa; --good: #38bdaa; --bad: #f08a73; --even: #7f8a99; --warn: #33280f;
    --warn-ink: #f3cf8e; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
header p, .soft { color: var(--soft); }
.eyebrow { margin: 0 0 8px; font-size: 14px; letter-spacing: .02em; }
h1 { font-size: clamp(26px, 4.4vw, 40px); line-height: 1.18; letter-spacing: -.015em; margin: 0 0 12px;
  font-weight: 650; text-wrap: balance; }
header .lead { font-size: 18px; margin: 0; max-width: 66ch; }
h2 { font-size: 21px; margin: 52px 0 4px; letter-spacing: -.01em; font-weight: 620; }
h3 { font-size: 15px; margin: 0 0 6px; font-weight: 600; }
h2 + p { margin: 0 0 16px; color: var(--soft); max-width: 74ch; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap:
  14px; margin: 30px 0 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px;
  min-width: 0; }
.number .value { font-size: 28px; line-height: 1.2; font-weight: 620; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.number .value span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
.number .what, .number .more { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
.number .value.good { color: var(--good); }
.number .value.bad { color: var(--bad); }
.alarm { background: var(--warn); color: var(--warn-ink); border-radius: 12px; padding: 14px 18px; margin:
  22px 0 0; }
.alarm strong { display: block; }
.alarm ul { margin: 6px 0 0; padding-left: 20px; }
.contents { margin: 26px 0 0; font-size: 15px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px
  18px; }
.contents a { color: var(--ink); text-decoration-color: var(--rule); text-underline-offset: 3px; }
section { scroll-margin-top: 64px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap:
  14px; }
svg { display: block; width: 100%; height: auto; }
.tick { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.rule { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; stroke:
  var(--aligned); }
.curve.base { stroke: var(--base); }
.curve.raw { stroke-width: 1; opacity: .28; }
.dot { fill: var(--aligned); }
.dot.base { fill: var(--base); }
.bar.base { fill: var(--base); opacity: .45; }
.outline { fill: none; stroke: var(--aligned); stroke-width: 2; stroke-linejoin: round; }
.mean { stroke-width: 1.5; stroke-dasharray: 2 3; }
.mean.base { stroke: var(--base); }
.mean.aligned { stroke: var(--aligned); }
.interval { opacity: .35; }
.good.interval, .good.point, .good.part { fill: var(--good); }
.bad.interval, .bad.point, .bad.part { fill: var(--bad); }
.even.interval, .even.point, .even.part { fill: var(--even); }
.part.even { opacity: .45; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin: 8px
  0 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.legend .base { background: var(--base); }
.legend .aligned { background: var(--aligned); }
.reward { display: grid; grid-template-columns: minmax(130px, 1fr) minmax(0, 2fr) minmax(0, 2fr); gap:
  10px 26px; align-items: center; margin-bottom: 12px; }
.reward h3 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
.reward p { margin: 0; font-size: 14px; color: var(--soft); font-variant-numeric: tabular-nums; }
.bar { max-width: 340px; }
.reward .bar { margin: 2px 0; }
.buttons { display: flex; flex-wrap: wrap; gap: 8px; margin: 4px 0 16px; }
button, select { font: inherit; font-size: 15px; color: var(--ink); background: var(--card); border: 1px solid
  var(--rule); border-radius: 999px; padding: 7px 16px; cursor: pointer; }
button[aria-pressed="true"] { background: var(--ink); color: var(--ground); border-color: var(--ink); }
select { max-width: 100%; }
button:focus-visible, select:focus-visible, summary:focus-visible { outline: 2px solid var(--aligned);
  outline-offset: 2px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap:
  16px; }
figure.pair { margin: 0; padding: 12px; }
figure.pair[hidden] { display: none; }
.images { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.images > div { min-width: 0; }
.images img, .images video { display: block; width: 100%; height: auto; border-radius: 6px; background:
  var(--rule); }
.images .tiny { image-rendering: pixelated; }
.images span { display: flex; justify-content: space-between; font-size: 13px; color: var(--soft);
  margin-top: 4px; font-variant-numeric: tabular-nums; }
figcaption { margin-top: 8px; font-size: 15px; line-height: 1.4; overflow-wrap: anywhere; }
figcaption small { display: block; color: var(--soft); font-size: 13px; font-variant-numeric:
  tabular-nums; }
.up { color: var(--good); }
.down { color: var(--bad); }
.stack { margin: 0; }
.live .stack { display: grid; grid-template-columns: minmax(0, 1fr); }
.live .stack > * { grid-area: 1 / 1; min-width: 0; }
.live .stack > :not(.on), .live .whose { visibility: hidden; }
.live .whose { height: 0; margin: 0; }
.switch { position: sticky; top: 0; z-index: 2; background: var(--ground); margin: 26px 0 0; padding: 8px 0;
  border-bottom: 1px solid var(--rule); }
.switch .buttons { margin: 0; flex-wrap: nowrap; overflow-x: auto; }
.switch button { white-space: nowrap; }
.standing { display: grid; grid-template-columns: minmax(120px, 1fr) minmax(0, 1.2fr) minmax(0, 1.6fr); gap:
  4px 22px; align-items: center; padding: 9px 0; border-top: 1px solid var(--rule); }
.standing:first-child, .axis + .standing { border-top: 0; }
.standing h3 { margin: 0; overflow-wrap: anywhere; }
.standing h3 small, .standing p small { font-weight: 400; color: var(--soft); font-size: 13px; }
.standing p { margin: 0; font-size: 14px; color: var(--soft); font-variant-numeric: tabular-nums; }
.standing p b { color: var(--ink); }
.standing.few { opacity: .55; }
.axes { display: grid; gap: 14px; }
.axis { color: var(--soft); }
.flag { background: var(--warn); color: var(--warn-ink); border-radius: 999px; padding: 1px 9px; font-size:
  13px; font-weight: 500; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--rule); vertical-align:
  top; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.key { width: 1%; padding-right: 40px; }
td:first-child { min-width: 7em; }
th:last-child, td:last-child { padding-right: 0; }
td.wrap { overflow-wrap: anywhere; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
footer { margin-top: 56px; color: var(--soft); font-size: 14px; }
@media (max-width: 940px) {
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (max-width: 820px) {
  .reward, .standing { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .reward > :first-child, .standing > :first-child { grid-column: 1 / -1; }
}
@media (max-width: 640px) {
  table { font-size: 14px; }
  th, td { padding-right: 8px; }
  td.n { white-space: normal; }
  main { padding: 26px 16px 56px; }
  .reward, .standing { grid-template-columns: minmax(0, 1fr); gap: 6px; }
  .reward > :first-child, .standing > :first-child { grid-column: auto; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .card { padding: 12px 14px; }
  .number .value { font-size: clamp(16px, 4.7vw, 22px); }
  h2 { margin-top: 40px; }
}
@media print {
  .buttons, .switch, .contents { display: none; }
  .card, figure.pair { break-inside: avoid; }
}
"""


_GRID = """
:scope { padding: 12px 18px; }
.grid { display: flex; flex-wrap: wrap; gap: 18px; margin: 22px 0 0; }
.tiny { image-rendering: pixelated; }
"""
_SECTION = re.compile(r'<section id="([\w-]+)">\n<h2>(.*?)</h2>')


def page(title: str, body: str) -> str:
    """Return a whole HTML document; ``title`` is escaped, ``body`` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def fragment(body: str) -> str:
    """Return a part of a page in the report's style, for a notebook: it does not restyle the page around it.

    There is no script, so the parts of all models are shown, one below the other.
    """
    style = _STYLE.replace(":root", ":scope").replace("\nbody {", "\n:scope {")
    return f'<style>@scope (.diffalign) {{{style}{_GRID}}}</style><div class="diffalign">{body}</div>'


def section(title: str, lead: str, body: str) -> str:
    """Return a section under a heading; ``lead`` is one or two plain sentences, ``body`` is HTML."""
    return (
        f'<section id="{_anchor(title)}">\n<h2>{escape(title)}</h2>\n<p>{escape(lead)}</p>\n{body}\n'
        "</section>\n"
    )


def contents(parts: Sequence[str]) -> str:
    """Return a list of links to the sections among the parts of a page, in their order."""
    found = [match for part in parts for match in _SECTION.findall(part)]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in found)
    return f'<nav class="contents" aria-label="Contents">{links}</nav>' if links else ""


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def table(head: list[str], rows: list[list[str]], numeric_from: int = 1) -> str:
    """Return a table of texts (escaped); columns from ``numeric_from`` on are numbers and stand to
    the right.
    """
    kinds = [
        "n" if i >= numeric_from else "key" if len(head) == 2 and i == 0 else "wrap" for i in range(len(head))
    ]
    top = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for h, k in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{escape(c)}</td>' for c, k in zip(row, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def legend(base: str, aligned: str) -> str:
    """Return a legend: words for the two colours of a chart."""
    return (
        f'<p class="legend"><span><i class="base"></i>{escape(base)}</span>'
        f'<span><i class="aligned"></i>{escape(aligned)}</span></p>'
    )


LEGEND = legend("base", "aligned")


def stack(variants: Mapping[str, str]) -> str:
    """Return HTML by model, of which the page shows one; all have the same place, so that choosing another
    moves nothing. Without a script all are shown, one below the other.
    """
    if len(variants) == 1:
        return next(iter(variants.values()))
    parts = "".join(
        f'<div data-model="{escape(name, quote=True)}"{" class=on" if i == 0 else ""}>'
        f'<h3 class="whose">{escape(name)}</h3>{body}</div>'
        for i, (name, body) in enumerate(variants.items())
    )
    return f'<div class="stack">{parts}</div>'
