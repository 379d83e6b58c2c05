"""Figures of matplotlib as inline SVG whose colours are variables of the page, so that they follow light and dark."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from qyolo_deploy.errors import RuntimeMissingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no variables, so these stand for them until the SVG is written. `OWN` is the colour of the group
# that a mark belongs to.
INK, SOFT, GRID, CARD, OWN = "#000001", "#000002", "#000003", "#000004", "#000005"
_VARIABLES = dict(zip((INK, SOFT, GRID, CARD, OWN), ("--ink", "--soft", "--grid", "--card", "--c"), strict=True))
FONT = 11.0
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "path.simplify": False,
    "text.parse_math": False,
    "font.size": FONT,
    "lines.solid_joinstyle": "round",
    "lines.solid_capstyle": "round",
}
_DEFAULTS = {"stroke-width": "1", "stroke-opacity": "1", "fill-opacity": "1", "opacity": "1"}
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def draw(
    width: float, height: float, box: tuple[float, float, float, float], title: str, paint: Callable[["Axes"], None]
) -> str:
    """Draw a figure of one pair of axes.

    Args:
        width: In px of the picture's own measure; it grows and shrinks with its place on the page.
        height: Likewise.
        box: Left, top, right and bottom margin of the axes in px.
        title: Read out in place of the picture.
        paint: Draws into the axes. A mark whose gid is `mark(...)` becomes a group with that class and hover text.

    Raises:
        RuntimeMissingError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    left, top, right, bottom = box
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's fonts draw the text, not matplotlib's
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        size = (1 - (left + right) / width, 1 - (top + bottom) / height)
        axes = figure.add_axes((left / width, bottom / height, *size))
        axes.patch.set_visible(False)
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = _Tidy(ElementTree.fromstring(buffer.getvalue())).root(width, height, printable(title))
    return ElementTree.tostring(root, encoding="unicode")


def require_matplotlib() -> None:
    """Return if matplotlib can be imported.

    Raises:
        RuntimeMissingError: It is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        hint = 'pip install "qyolo_deploy[build]"'
        raise RuntimeMissingError("Charts need matplotlib, which is not installed.", hint) from error


def mark(style: str, text: str = "") -> str:
    """Return the gid of a mark: the class that gives its colour, and what is told when it is pointed at."""
    return f"{style}|{printable(text)}"


def printable(text: str) -> str:
    """Return a text without what XML cannot hold."""
    return "".join(char for char in text if char.isprintable())


class _Tidy:
    """What matplotlib wrote, without ids, metadata, style attributes and digits that nobody sees."""

    def __init__(self, source: ElementTree.Element) -> None:
        self._source = source
        self._shapes = {shape.get("id"): shape for shape in source.iterfind(".//{*}defs/{*}path")}

    def root(self, width: float, height: float, title: str) -> ElementTree.Element:
        attributes = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": title, "class": "plot"}
        root = ElementTree.Element("svg", attributes)
        ElementTree.SubElement(root, "title").text = title
        for child in self._source:
            root.extend(self._tidied(child))
        return root

    def _tidied(self, element: ElementTree.Element) -> Iterator[ElementTree.Element]:
        """Yield what stands for an element: groups that say nothing give way to what they hold."""
        name = element.tag.rpartition("}")[2]
        if name in ("defs", "metadata"):
            return
        style, _, text = element.get("id", "").partition("|")
        if name != "g":
            yield self._shape(name, element)
            return
        children = [part for child in element for part in self._tidied(child)]
        if "|" not in element.get("id", ""):
            yield from children
            return
        group = ElementTree.Element("g", {"class": style})
        if text:
            ElementTree.SubElement(group, "title").text = text
        group.extend(children)
        yield group

    def _shape(self, name: str, element: ElementTree.Element) -> ElementTree.Element:
        attributes = _declarations(element.get("style", ""))
        for key in ("x", "y", "d"):
            if key in element.attrib:
                attributes[key] = _short(element.attrib[key])
        turn = element.get("transform", "")
        if turn and not turn.startswith("rotate(-0 "):
            attributes["transform"] = _short(turn)
        if name == "use":
            shape = self._shapes[element.get("{http://www.w3.org/1999/xlink}href", "").lstrip("#")]
            place = f"translate({attributes.pop('x')} {attributes.pop('y')})"
            name, attributes = "path", {**attributes, "d": _short(shape.get("d", "")), "transform": place}
        tidied = ElementTree.Element(name, attributes)
        tidied.text = element.text if name == "text" else None
        return tidied


def _declarations(style: str) -> dict[str, str]:
    """Return declarations as attributes, without fonts, which are the page's, and without defaults."""
    pairs = (part.split(":", 1) for part in style.split(";") if part.strip())
    found = {key.strip(): value.strip() for key, value in pairs}
    return {
        key: f"var({_VARIABLES[value]})" if value in _VARIABLES else value.removesuffix("px")
        for key, value in found.items()
        if key not in ("font-family", "font", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit")
        and _DEFAULTS.get(key) != value
    }


def _short(text: str) -> str:
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}", " ".join(text.split()))
