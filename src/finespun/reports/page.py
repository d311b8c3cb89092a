"""A page is one HTML file that needs nothing but a browser. Layouts are the `.html.j2` files in `pages/`; what several
kinds of page show is made here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finespun.data.formats import Message
from finespun.files import write_text
from finespun.reports.figures import count, percent, perplexity, perplexity_interval, share

PAGES = Path(__file__).parent / "pages"


def environment(*folders: Path) -> Environment:
    """Templates of `folders` and of finespun's own pages."""
    made = Environment(
        loader=FileSystemLoader([*folders, PAGES], encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "count": count,
        "percent": percent,
        "share": share,
        "perplexity": perplexity,
        "interval": perplexity_interval,
        "sha256_source": _sha256_source,
    }
    return made


def write_page(path: Path, template: str, view: Mapping[str, Any], *folders: Path) -> None:
    """Writes a page whole or not at all. Raises `RunError` where the disk does not take it."""
    write_text(path, environment(*folders).get_template(template).render(view, version=version("finespun")))


def _sha256_source(text: str) -> str:
    """The name by which a Content-Security-Policy allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def turns(prompt: str | list[Message]) -> list[Message]:
    """A prompt as the messages that a page shows; a text is one that nobody says."""
    return [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt


def named(files: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, path and hash of each file."""
    return [(Path(path).name, path, digest) for path, digest in files.items()]


def bars(
    counts: Sequence[int],
    edges: Sequence[float],
    median: float,
    unit: str = "",
    written: Callable[[float], str] = count,
) -> dict[str, Any]:
    """A histogram in units of its own picture: bars 1 wide, the highest 100 high. `written` is how an edge is."""
    highest = max(counts)
    return {
        "bars": [
            {"height": 100 * number / highest, "title": f"{written(start)} to {written(end)}{unit}: {number:,}"}
            for number, start, end in zip(counts, edges, edges[1:], strict=False)
        ],
        "ticks": [written(tick) for tick in (edges[0], (edges[0] + edges[-1]) / 2, edges[-1])],
        "highest": highest,
        "median": len(counts) * (median - edges[0]) / (edges[-1] - edges[0]),
    }
