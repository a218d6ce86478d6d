"""The frame of a page and its tables: HTML with everything in it, so that it can be mailed and opened offline."""

import base64
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from c2r import __version__


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a page of (heading, HTML) sections, without those that are empty."""
    shown = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a>' for heading, _ in shown)
    body = "".join(f'<section id="{_anchor(h)}"><h2>{escape(h)}</h2>{content}</section>' for h, content in shown)
    style, script = (files("c2r.reporting").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} – C2R</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>C2R {escape(__version__)}, {escape(made)}</p><nav>{links}</nav></header>"
        f"<main>{body}</main><script>{script}</script></body></html>\n"
    )


def _anchor(heading):
    return heading.lower().replace(" ", "-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table of HTML cells, which scrolls on a narrow page."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def data_address(path: Path, kind: str) -> str:
    """Return the content of a file as a data: address, such as of `video/mp4`."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
