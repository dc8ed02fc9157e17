"""Self-contained web pages: helpers that escape what they are given, the style sheet, and numbers with their units."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NewType

from fedssl.files import number

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
h1 { margin: .35rem 0 .7rem; font-size: clamp(1.3rem, 2.4vw, 1.75rem); line-height: 1.28; font-weight: 650;
  max-width: 54rem; text-wrap: pretty; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.15rem; font-weight: 650; }
p.note { color: var(--soft); font-size: .9rem; max-width: 46rem; margin: .6rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 1px; margin-top: 1.8rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tile { background: var(--card); padding: .7rem .9rem; outline: 1px solid var(--line); }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile.words b { font-size: 1rem; line-height: 1.7rem; white-space: normal; }
.tile span { color: var(--soft); font-size: .82rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child, th.word, td.word { text-align: left; }
table.dense { font-size: .82rem; }
table.dense th, table.dense td { padding: .4rem .45rem; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.word { white-space: normal; overflow-wrap: break-word; max-width: 20rem; }
table.dense thead th, table.dense tbody th { white-space: normal; }
table.dense tbody th { min-width: 8rem; }
tbody tr.mean > * { background: color-mix(in srgb, var(--accent) 9%, var(--card)) !important; }
.figures { columns: 2 24rem; column-gap: 1.2rem; }
figure { margin: 0 0 1.2rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  background: var(--card); break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: .9rem .9rem .6rem; }
figcaption { padding: .6rem .9rem .8rem; font-size: .88rem; color: var(--soft); border-top: 1px solid var(--line); }
ul.checks { list-style: none; margin: 0; padding: 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); overflow: hidden; }
ul.checks li { display: grid; grid-template-columns: 10rem 1fr; gap: .9rem; padding: .6rem .9rem; }
ul.checks li + li { border-top: 1px solid var(--line); }
ul.checks b { font-weight: 600; }
.alarm { background: var(--alarm-ground); }
.alarm b { color: var(--alarm); }
header p.alarm { color: var(--ink); font-size: .95rem; margin: 1rem 0 0; padding: .7rem .9rem; max-width: 54rem;
  border-left: 4px solid var(--alarm); }
details { margin-top: 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 500; }
pre { margin: 0; padding: .8rem .9rem; overflow-x: auto; border-top: 1px solid var(--line);
  font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (min-width: 56rem) { table.dense tbody th { position: sticky; left: 0; background: var(--card); } }
@media (max-width: 56rem) { .tiles { grid-template-columns: 1fr 1fr; } }
@media (max-width: 34rem) { ul.checks li { grid-template-columns: 1fr; gap: .1rem; }
  body { padding-top: 1.2rem; } table { font-size: .78rem; } th, td { padding: .4rem .35rem; }
  thead th { white-space: normal; } }
@media print { body { max-width: none; } details { display: none; } }
"""


def tag(name: str, *children: Html, cls: str = "") -> Html:
    """An element around finished markup."""
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
    kind = [' class="word"' if at in words else "" for at in range(len(rows[0]))]
    head = "".join(f'<th scope="col"{cls}>{text(cell)}</th>' for cell, cls in zip(rows[0], kind, strict=True))
    body = "".join(
        f"<tr{' class=mean' if i in means else ''}>"
        + f'<th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{cls}>{text(cell)}</td>" for cell, cls in zip(row[1:], kind[1:], strict=True))
        + "</tr>"
        for i, row in enumerate(rows[1:], 1)
    )
    dense = " class=dense" if len(rows[0]) > 8 else ""
    inner = f"<table{dense}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return Html(f'<div class="scroll" tabindex="0">{inner}</div>')


def picture(svg: bytes, caption: str) -> Html:
    """A figure within the page, on white in dark mode too. Its caption is its text for screen readers."""
    data = base64.b64encode(svg).decode()
    img = Html(f'<img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}">')
    return tag("figure", img, tag("figcaption", text(caption)))


def gallery(pictures: Sequence[tuple[bytes, str]]) -> list[Html]:
    """Figures with their captions, side by side where there is room; nothing if there are none."""
    return [tag("div", *(picture(*each) for each in pictures), cls="figures")] if pictures else []


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
