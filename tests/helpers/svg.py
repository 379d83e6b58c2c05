"""Reading charts back: the numbers that their shapes stand for."""

import re


def number(text):
    return float(text.replace("−", "-"))


def axis(svg, anchor, coordinate, offset=0.0, inverse=False):
    """The function from places to numbers that an axis tells by its ticks, or from numbers to places."""
    ticks = [
        (float(text.get(coordinate)) - offset, number(text.text))
        for text in svg.iter("text")
        if text.get("text-anchor") == anchor and re.fullmatch(r"[−\d.]+", text.text)
    ]
    (first, low), (last, high) = ticks[0], ticks[-1]
    if inverse:
        return lambda value: first + (value - low) * (last - first) / (high - low)
    return lambda place: low + (place - first) * (high - low) / (last - first)


def shapes(svg, style):
    """Corners of each path of a style; a mark, which lies at its place by a transform, is left out."""
    paths = [path for group in svg.iter("g") if group.get("class") == style for path in group.iter("path")]
    return [
        [tuple(map(float, pair.split())) for pair in re.findall(r"-?[\d.]+ -?[\d.]+", path.get("d"))]
        for path in paths
        if path.get("transform") is None
    ]


def lines(svg):
    """Points of each line by its style, in the numbers of the axes."""
    x_of, y_of = axis(svg, "middle", "x"), axis(svg, "end", "y", 4.2)
    styles = {group.get("class") for group in svg.iter("g")}
    return {style: [(x_of(x), y_of(y)) for line in shapes(svg, style) for x, y in line] for style in styles}
