"""Self-contained web pages: helpers that escape what they are given, the style sheet, and numbers with their units."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import NewType

Html = NewType("Html", str)  # finished markup; a plain str is text and gets escaped

NOTHING = "–"  # noqa: RUF001  an en dash: not measured
MINUS = "−"  # noqa: RUF001  a minus sign

CSS = """
:root { color-scheme: light dark; --ground: #fbfbf9; --ink: #1c2430; --soft: #5a6472; --line: #d9dbd7;
  --card: #ffffff; --accent: #0060a0; --alarm: #a3330b; --alarm-ground: #fdeee6; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e6e9ec; --soft: #9aa5b1; --line: #323a44;
  --card: #1c2229; --accent: #6cb8ee; --alarm: #ffa37a; --alarm-ground: #3a2116; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 72rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { margin: .35rem 0 .7rem; font-size: clamp(1.35rem, 2.6vw, 1.9rem); line-height: 1.25; font-weight: 650;
  max-width: 46rem; text-wrap: pretty; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.15rem; font-weight: 650; }
p.note { color: var(--soft); font-size: .9rem; max-width: 46rem; margin: .6rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 46%), 1fr)); gap: 1px; margin-top: 1.8rem;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tile { background: var(--card); padding: .7rem .9rem; outline: 1px solid var(--line); }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile.words b { font-size: 1rem; line-height: 1.7rem; }
.tile span { color: var(--soft); font-size: .82rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child, td.word { text-align: left; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.word { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
tr.mean > * { background: color-mix(in srgb, var(--accent) 9%, transparent); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.2rem;
  align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--card); }
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: .9rem .9rem .6rem; }
figcaption { padding: .6rem .9rem .8rem; font-size: .88rem; color: var(--soft); border-top: 1px solid var(--line); }
ul.checks { list-style: none; margin: 0; padding: 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); overflow: hidden; }
ul.checks li { display: grid; grid-template-columns: 7.5rem 1fr; gap: .9rem; padding: .6rem .9rem; }
ul.checks li + li { border-top: 1px solid var(--line); }
ul.checks b { font-weight: 600; }
.alarm { background: var(--alarm-ground); }
.alarm b { color: var(--alarm); }
p.alarm { margin: 1rem 0 0; padding: .7rem .9rem; border-left: 4px solid var(--alarm); max-width: 46rem; }
details { margin-top: 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 500; }
pre { margin: 0; padding: .8rem .9rem; overflow-x: auto; border-top: 1px solid var(--line);
  font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 34rem) { ul.checks li { grid-template-columns: 1fr; gap: .1rem; }
  body { padding-top: 1.2rem; } th, td { padding: .4rem .6rem; } }
@media print { body { max-width: none; } details { display: none; } figure { break-inside: avoid; } }
"""


def tag(name: str, *children: str | Html, cls: str = "") -> Html:
    """An element; children that are plain text must have been made with `text`, `join` or another helper."""
    return Html(f"<{name}{f' class={chr(34)}{escape(cls)}{chr(34)}' if cls else ''}>{''.join(children)}</{name}>")


def text(value: object) -> Html:
    """Any value as text."""
    return Html(escape(str(value)))


def tile(value: str, label: str) -> Html:
    """A key number with its unit, and what it is. Words are set smaller than numbers."""
    cls = "tile" if any(c.isdigit() for c in value) else "tile words"
    return tag("div", tag("b", text(value)), tag("span", text(label)), cls=cls)


def table(rows: Sequence[Sequence[str]], words: Sequence[int] = (), means: Sequence[int] = ()) -> Html:
    """A table that scrolls sideways where the screen is narrow.

    Args:
        rows: the first holds the headings; the first cell of the others heads its row.
        words: columns that hold words, not numbers.
        means: rows, counted with the headings, that sum up others.
    """
    kind = {True: ' class="word"', False: ""}
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in rows[0])
    body = "".join(
        f"<tr{' class=mean' if i in means else ''}>"
        + f'<th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{kind[at in words]}>{text(cell)}</td>" for at, cell in enumerate(row[1:], 1))
        + "</tr>"
        for i, row in enumerate(rows[1:], 1)
    )
    return Html(
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def picture(svg: bytes, caption: str) -> Html:
    """A figure within the page, on white in dark mode too. Its caption is its text for screen readers."""
    data = base64.b64encode(svg).decode()
    img = f'<img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}">'
    return tag("figure", img, tag("figcaption", text(caption)))


def folded(title: str, content: str) -> Html:
    """Long text behind its title."""
    return tag("details", tag("summary", text(title)), tag("pre", text(content)))


def section(title: str, *children: Html) -> Html:
    """A part of the page under its heading; nothing if it has no content."""
    return tag("section", tag("h2", text(title)), *children) if any(children) else Html("")


def page(title: str, *children: Html) -> str:
    """The whole document. Its policy forbids the browser every request."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body>{''.join(children)}</body></html>\n"
    )


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: object, std: object = None) -> str:
    """A share as "71.7 %", with its spread as "71.7 ± 2.7 %"."""
    share, spread = number(value), number(std)
    if share is None:
        return NOTHING
    return f"{100 * share:.1f} %" if spread is None else f"{100 * share:.1f} ± {100 * spread:.1f} %"


def decimal(value: object, digits: int) -> str:
    """A number with so many digits after the point."""
    found = number(value)
    return NOTHING if found is None else f"{found:.{digits}f}".replace("-", MINUS)


def megabytes(value: object) -> str:
    """Bytes in millions."""
    found = number(value)
    return NOTHING if found is None else f"{found / 1e6:.{1 if found < 1e9 else 0}f} MB"


def duration(value: object) -> str:
    """Seconds as "16.3 s", "4 min 12 s" or "2 h 05 min"."""
    found = number(value)
    if found is None:
        return NOTHING
    if found < 100:
        return f"{found:.1f} s"
    minutes, seconds = divmod(round(found), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
