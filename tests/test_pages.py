"""Self-contained pages: tables, figures, and nothing from elsewhere."""

import html.parser
import math
import re

import pytest

from kronjax import pages
from kronjax.pages import Points, Share


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and all that is not closed."""

    VOID = {"meta", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


SHARES = [
    Share("h.0.<fc>", "h.*.fc", 300, 100),
    Share("h.0.attn", "h.*.attn", 100, 100),
    Share("h.1.<fc>", "h.*.fc", 300, 30),
]


def test_a_page_is_closed_escapes_texts_and_loads_nothing():
    rows = [("<b>", "1,000"), ("", "5 %")]
    parts = [
        pages.paragraph("<i> & more", is_quiet=True),
        pages.table(("name", "number"), rows, sorts=True),
        pages.budget(SHARES),
        pages.chart([Points("<a>", [1, 2], [3, 4], ["<x>", "y"])], "<x>", "<y>"),
    ]
    text = pages.page("<title>", parts)
    tags = Tags(text)
    assert tags.open == []
    assert not {"b", "i", "x", "y", "fc"} & {
        tag for tag, attrs in tags.tags if "style" not in attrs
    }
    assert len(tags.named("script")) == 1
    assert not re.search(r"https?:|@import|url\(|src=|href=", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_columns_of_a_budget_are_as_wide_and_as_full_as_their_matrices():
    tags = Tags(pages.budget(SHARES))
    frames, filled = [], []
    for attrs in tags.named("rect"):
        (frames if "class" in attrs else filled).append(attrs)
    widths = [float(x["width"]) for x in frames]
    assert widths[0] == widths[2] == pytest.approx(3 * widths[1], rel=0.02)
    heights = [float(x["height"]) / float(frames[0]["height"]) for x in filled]
    assert heights == pytest.approx([1 / 3, 1, 1 / 10], abs=0.001)
    assert filled[0]["fill"] == filled[2]["fill"] != filled[1]["fill"]
    key = " ".join(tags.texts)
    assert "h.*.fc: 57% of what is kept, 22% of dense" in key


def test_an_empty_model_and_an_empty_chart_have_figures_without_marks():
    assert not Tags(pages.budget([])).named("rect")
    assert pages.chart([Points("none", [math.nan], [1.0])], "x", "y") == ""
    assert (
        pages.chart([Points("none", [0.0], [1.0])], "x", "y", logs=(True, True)) == ""
    )


def test_points_lie_inside_the_chart_and_keep_their_order():
    points = Points("all", [1.0, 10.0, 100.0], [1e-3, 1e-1, 1e-2])
    for logs in ((False, False), (True, True)):
        chart = pages.chart([points], "x", "y", logs=logs, has_diagonal=logs[0])
        found = Tags(chart).named("circle")
        xs, ys = ([float(c[key]) for c in found] for key in ("cx", "cy"))
        assert xs == sorted(xs) and ys[0] > ys[2] > ys[1]
        assert xs[0] >= pages.LEFT and xs[-1] <= pages.WIDTH - pages.RIGHT
        assert min(ys) >= pages.TOP and max(ys) <= pages.HEIGHT - pages.BOTTOM


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 7.0, 1e5])
@pytest.mark.parametrize("low", [0.0, -0.3, 0.9])
def test_ticks_are_few_and_inside(low, scale):
    found = pages.ticks(low * scale, 1.2 * scale)
    assert 1 <= len(found) <= 7
    slack = 1e-9 * scale
    assert all(low * scale - slack <= x <= 1.2 * scale + slack for x in found)
