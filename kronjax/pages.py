"""Self-contained HTML pages: tables that sort, and figures in SVG.

A page loads nothing: styles, script and figures are inside. Colours follow the setting
of the reader, light or dark, and wide tables and figures scroll on narrow screens.

>>> Share("h.0.fc", "fc", 200, 50).kept
50
>>> ticks(0.0, 0.7)
[0.0, 0.2, 0.4, 0.6]
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --quiet: #5f6b7a;
  --line: #e3e5e8; --soft: #f4f5f7; --link: #2457c5;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #a8588c; --c4: #b58900;
  --c5: #3f8fbf; --c6: #777; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --back: #16181d;
  --quiet: #9aa4b2; --line: #343944; --soft: #21252d; --link: #8ab4f8;
  --c0: #4aa8de; --c1: #f08a4b; --c2: #3fc79a; --c3: #d58ab9; --c4: #e0b93a;
  --c5: #86c5ea; --c6: #a0a0a0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; }
th:first-child, td:first-child, .left { text-align: left; }
th { font-weight: 600; background: var(--soft); position: sticky; top: 0; }
.sortable th { cursor: pointer; user-select: none; white-space: nowrap; }
.sortable th[aria-sort=ascending]::after { content: " ▴"; }
.sortable th[aria-sort=descending]::after { content: " ▾"; }
.scroll { overflow-x: auto; } .quiet, figcaption { color: var(--quiet); }
.left { min-width: 8rem; }
td:first-child, td:not(.left) { white-space: nowrap; }
code { font-size: .92em; }
details pre { background: var(--soft); padding: 1rem; overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; margin-bottom: .4rem; }
svg { display: block; width: 100%; min-width: 40rem; max-width: 60rem; height: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.frame { fill: var(--soft); } .grid { stroke: var(--line); fill: none; }
.guide { stroke: var(--quiet); stroke-dasharray: 4 4; fill: none; }
.thin { fill: none; stroke-width: 1; opacity: .3; }
.thick { fill: none; stroke-width: 2.5; }
ul.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none;
  padding: 0; margin: .5rem 0; font-size: .9rem; }
ul.key i { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: 2px; }
"""

SCRIPT = """
const value = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const isNumber = /^[-+]?[\\d.,]+(e[-+]?\\d+)?( ?(%|M|MiB|MFLOP))?$/.test(text);
  return isNumber ? parseFloat(text.replace(/,/g, "")) : text;
};
const compare = (a, b) => typeof a === "number" && typeof b === "number"
  ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const rises = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(x => x.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rises ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const isEmpty = row => value(row, column) === "";
      rows.sort((a, b) => isEmpty(a) - isEmpty(b)
        || (rises ? 1 : -1) * compare(value(a, column), value(b, column)));
      table.tBodies[0].append(...rows);
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""

COLORS = 7
"""Number of colours; further groups share the last one."""

WIDTH, HEIGHT = 800, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 10, 44


@dataclasses.dataclass(frozen=True)
class Share:
    """The parameters of one matrix.

    Attributes:
        name: Name of the matrix.
        group: Name of its group, which has one colour.
        size: Number of parameters of the dense matrix.
        kept: Number of parameters that replace them.
    """

    name: str
    group: str
    size: int
    kept: int


@dataclasses.dataclass(frozen=True)
class Points:
    """Points of a chart in one colour.

    Attributes:
        name: Name in the key.
        x: Horizontal coordinates.
        y: Vertical coordinates.
        labels: A text for each point, shown under the pointer; may be empty.
        is_line: Whether the points are joined.
        is_thin: Whether the line is one of many, without a place in the key.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    is_line: bool = False
    is_thin: bool = False


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page.

    Args:
        title: The title, as text.
        parts: The body, as HTML.
    """
    name, body = html.escape(title), "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1>\n"
        f"{body}\n<script>{SCRIPT}</script>\n</html>\n"
    )


def paragraph(text: str, *, is_quiet: bool = False) -> str:
    """Return a text as a paragraph."""
    mark = " class=quiet" if is_quiet else ""
    return f"<p{mark}>{html.escape(text)}</p>"


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Sequence[int] = (0,),
    *,
    sorts: bool = False,
) -> str:
    """Return a table.

    Args:
        heads: Names of the columns.
        rows: The cells of each row, as text.
        left: Numbers of the columns of text, which begin at the left.
        sorts: Whether a click on the name of a column sorts the rows.
    """

    def cells(tag, row):
        for i, cell in enumerate(row):
            mark = " class=left" if i in left else ""
            yield f"<{tag}{mark}>{html.escape(str(cell))}</{tag}>"

    head = "".join(cells("th", heads))
    body = "\n".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in rows)
    mark = " class=sortable" if sorts else ""
    return (
        f"<div class=scroll><table{mark}><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def budget(shares: Sequence[Share]) -> str:
    """Return a figure of where the parameters are: areas are numbers of parameters.

    Every matrix has a column as wide as it is large, filled as far as it is kept.

    Args:
        shares: The matrices, in the order of the model.
    """
    total = max(sum(x.size for x in shares), 1)
    groups = list(dict.fromkeys(x.group for x in shares))
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts, x = [], float(LEFT)
    for each in shares:
        width = inner * each.size / total
        fraction = each.kept / max(each.size, 1)
        height = tall * min(fraction, 1.0)
        gap = min(1.0, width / 5)
        words = html.escape(f"{each.name}: {each.kept:,} of {each.size:,}")
        parts.append(
            f"<g><title>{words} ({fraction:.1%})</title>"
            f"<rect class=frame x={x:.2f} y={TOP} width={width - gap:.2f} "
            f'height={tall} /><rect fill="{_color(groups, each.group)}" x={x:.2f} '
            f"y={TOP + tall - height:.2f} width={width - gap:.2f} "
            f"height={height:.2f} /></g>"
        )
        x += width
    for part in (0.0, 0.5, 1.0):
        y = TOP + tall * (1 - part)
        parts.append(_text(LEFT - 6, y + 4, f"{part:.0%}", "end"))
    words = "matrices in the order of the model, as wide as they are large"
    parts.append(_text(LEFT + inner / 2, HEIGHT - 10, words, "middle"))
    kept = max(sum(x.kept for x in shares), 1)
    key = []
    for group in groups:
        members = [x for x in shares if x.group == group]
        ours, dense = sum(x.kept for x in members), sum(x.size for x in members)
        words = (
            f"{group}: {ours / kept:.0%} of what is kept, {ours / max(dense, 1):.0%}"
        )
        key.append((f"{words} of dense", _color(groups, group)))
    return _figure(parts, key, "Parameters kept of every matrix")


def chart(
    series: Sequence[Points],
    x_label: str,
    y_label: str,
    *,
    logs: tuple[bool, bool] = (False, False),
    has_diagonal: bool = False,
) -> str:
    """Return a chart of points and lines.

    Args:
        series: The points; those that are not finite are left out.
        x_label: Text below the horizontal axis.
        y_label: Text above the vertical axis.
        logs: Whether the axes are logarithmic; points at zero and below are then left
            out.
        has_diagonal: Whether to draw the line of equal values.
    """
    kept = [(points, list(_finite(points, logs))) for points in series]
    xs = [point[0] for _, points in kept for point in points]
    ys = [point[1] for _, points in kept for point in points]
    if not xs:
        return ""
    ys += [] if logs[1] else [0.0]
    if has_diagonal:
        xs = ys = [*xs, *ys]
    across, down = _Axis(xs, logs[0]), _Axis(ys, logs[1])
    parts = []
    for value in down.ticks():
        y = down.place(value, HEIGHT - BOTTOM, TOP)
        parts.append(f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" />')
        parts.append(_text(LEFT - 6, y + 4, _short(value), "end"))
    for value in across.ticks():
        x = across.place(value, LEFT, WIDTH - RIGHT)
        parts.append(_text(x, HEIGHT - BOTTOM + 18, _short(value), "middle"))
    if has_diagonal:
        path = f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"
        parts.append(f'<path class=guide d="{path}" />')
    names = list(dict.fromkeys(x.name for x in series if not x.is_thin))
    for points, found in kept:
        places = [
            (
                across.place(x, LEFT, WIDTH - RIGHT),
                down.place(y, HEIGHT - BOTTOM, TOP),
                label,
            )
            for x, y, label in found
        ]
        color = "var(--c0)" if points.is_thin else _color(names, points.name)
        parts.append(_drawn(points, places, color))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x_label, "middle"))
    key = [(name, _color(names, name)) for name in names if name]
    return _figure(parts, key, y_label)


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two numbers, two to six of them."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10(high - low))
    for factor in (0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


class _Axis:
    """The map from numbers to places along one axis."""

    def __init__(self, values: Sequence[float], is_log: bool):
        self.is_log = is_log
        given = [self._of(x) for x in values]
        self.low, self.high = min(given), max(given)
        if self.high - self.low < 1e-12 * max(abs(self.high), 1.0):
            self.low, self.high = self.low - 0.5, self.high + 0.5
        else:
            self.high += 0.05 * (self.high - self.low)
            self.low -= 0.05 * (self.high - self.low) * (is_log or self.low != 0)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def place(self, value: float, begin: float, end: float) -> float:
        """Return the place of a number between those of both ends."""
        return begin + (end - begin) * (self._of(value) - self.low) / (
            self.high - self.low
        )

    def ticks(self) -> list[float]:
        """Return the numbers to write along the axis."""
        if not self.is_log:
            return ticks(self.low, self.high)
        few = self.high - self.low < 2
        factors = (1, 2, 5) if few else (1,)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        stride = max(1, len(powers) // 6)
        found = [f * 10.0**i for i in powers[::stride] for f in factors]
        return [x for x in found if self.low <= math.log10(x) <= self.high]


def _finite(points: Points, logs):
    labels = points.labels or [""] * len(points.x)
    for x, y, label in zip(points.x, points.y, labels, strict=True):
        is_finite = math.isfinite(x) and math.isfinite(y)
        if is_finite and all(v > 0 or not log for v, log in zip((x, y), logs)):  # noqa: B905
            yield x, y, label


def _drawn(points: Points, places, color) -> str:
    if points.is_line:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        mark = "thin" if points.is_thin else "thick"
        return f'<path class={mark} stroke="{color}" d="M{path}" />' if path else ""
    return "".join(
        f'<circle cx={x:.1f} cy={y:.1f} r=3.5 fill="{color}" fill-opacity=".75">'
        f"<title>{html.escape(label)}</title></circle>"
        for x, y, label in places
    )


def _figure(parts: Sequence[str], key, caption: str) -> str:
    items = "".join(
        f'<li><i style="background:{color}"></i>{html.escape(text)}</li>'
        for text, color in key
    )
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption><div class=scroll>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(caption)}">{"".join(parts)}</svg></div>'
        f"<ul class=key>{items}</ul></figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x={x:.1f} y={y:.1f} text-anchor={anchor}>{html.escape(text)}</text>"


def _color(groups: Sequence[str], group: str) -> str:
    return f"var(--c{min(groups.index(group), COLORS - 1)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
