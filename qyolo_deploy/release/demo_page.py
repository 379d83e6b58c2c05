"""Small demonstrations as one HTML file each: no scripts, no requests, no fonts, and no packages to write them."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from qyolo_deploy.atomic import write_atomic


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, the first cell of each row its heading."""
    tops = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{tops}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def write_demo_page(path_html: str | os.PathLike[str], name: str, parts: Mapping[str, str]) -> None:
    """Fill the template `name` and write it as one self-contained file.

    Args:
        path_html: The file to write.
        name: Template in `templates/`, without its suffix; `$part` stands for a part.
        parts: Name of a part -> its HTML or SVG, put in as it is.

    Raises:
        InputError: The file cannot be written.
    """
    folder = Path(__file__).parent / "templates"
    style = (folder / "demo.css").read_text(encoding="utf-8")
    page = Template((folder / f"{name}.html").read_text(encoding="utf-8"))
    write_atomic(path_html, page.substitute(parts, style=style))
