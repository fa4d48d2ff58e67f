"""HTML and SVG from Python, with everything escaped that is not markup already.

    element("td", "a < b", class_="number")   is   <td class="number">a &lt; b</td>

What `element` returns is `Markup`, and only `Markup` goes into another element as it is, so that no text of a run (a
path, a recipe, an error) can become a tag.
"""

from __future__ import annotations

from html import escape

VOID = frozenset({"meta", "br", "hr", "line", "rect", "path", "circle"})
Content = object
"""`Markup` stays as it is, None is nothing, anything else becomes escaped text."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: Content, **attributes: object) -> Markup:
    """One element.  `class_` is `class`, other underscores are hyphens; attributes of None are left out."""
    names = {key: "class" if key == "class_" else key.replace("_", "-") for key in attributes}
    said = "".join(f' {names[key]}="{escape(_text(value))}"' for key, value in attributes.items() if value is not None)
    if name in VOID and not children:
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{join(*children)}</{name}>")


def join(*children: Content) -> Markup:
    """Several after one another."""
    return Markup("".join(c if isinstance(c, Markup) else escape(_text(c)) for c in children if c is not None))


def table(head: list[str], rows: list[list[Content]], caption: str | None = None) -> Markup:
    """A table whose first column is a row's name; it scrolls sideways where it is too wide."""
    caption_ = element("caption", caption) if caption else None
    header = element("tr", *(element("th", text, scope="col") for text in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    inner = element("table", caption_, element("thead", header), element("tbody", *body))
    return element("div", inner, class_="wide", tabindex=0, role="region", aria_label=caption or head[0])


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
