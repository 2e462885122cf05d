import dataclasses
import html.parser

import jax
import numpy as np
import pytest
from test_report import approximation, baseline

from kronjax import Configuration, display, search
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg.residuals import ResidualNorms
from kronjax.permute import permute
from kronjax.proof import newton
from kronjax.proof.certificate import Certificate

MOST_LINES = 10


def certificate(error, second_order=""):
    error = np.asarray(error, float)
    names = np.full(error.shape, second_order, object)[()]
    return Certificate(error, error / 2, error / 1000, error / 2, error, names)


def check_text(text):
    """Require at most ten lines of at most 88 ASCII characters, and no array."""
    lines = text.splitlines()
    assert 1 <= len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= display.WIDTH
    assert text.isascii() and "array" not in text
    assert "[" not in text


class Cells(html.parser.HTMLParser):
    """Collects the texts of a table, and checks that its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_spread_shows_scalars_and_the_median_and_the_worst_of_a_batch():
    assert display.spread(np.float64(1.5)) == display.spread([[1.5]]) == "1.5"
    assert display.spread([[1.0, 2.0], [3.0, 9.0]]) == "median 2.5, worst 9"
    assert display.spread([1.0, 3.0, np.nan]) == "median 2, worst 3, 1 not finite"
    assert display.spread([1, 3], ".1f", " s") == "median 2.0 s, worst 3.0 s"
    assert display.spread([np.inf, np.nan]) == "not finite"
    assert display.spread(np.nan) == "nan"


def test_long_sums_and_long_texts_are_cut():
    parts = [(1, (2, 3), (3, 2))] * 5
    assert display.formula(parts).endswith("kron(2x3, 3x2) + 2 more")
    lines = display.lines("word " * 50, [("label", "word " * 50)])
    assert all(line.endswith(" ...") for line in lines)
    assert max(map(len, lines)) <= display.WIDTH


def test_tables_escape_their_texts():
    text = display.table("a < b", [("<script>", "&")], ("x", "y"))
    assert "<script>" not in text
    assert Cells(text).texts == ["a < b", "x", "y", "<script>", "&"]


@pytest.mark.parametrize("errors", [2.0, np.linspace(1, 2, 60).reshape(3, 20)])
def test_the_summary_of_an_approximation_has_at_most_ten_lines(errors):
    errors = np.asarray(errors)
    norms = ResidualNorms(errors, errors)
    plain = approximation(errors, errors)
    full = dataclasses.replace(
        plain,
        terms=plain.terms * 12,
        weighted=norms,
        weighted_relative=norms,
        certificate=certificate(errors, "strict local minimum"),
        notes=("a long note about the input " * 4, "another"),
    )
    for each in (plain, full):
        lines = display.summary_lines(each)
        check_text("\n".join(lines))
        texts = Cells(display.summary_html(each)).texts
        assert texts[0] == lines[0]
        assert len(texts) == 1 + 2 * (len(lines) - 1)
    assert len(display.summary_lines(full)) == MOST_LINES


def test_the_summary_says_what_was_solved_and_how_well():
    text = "\n".join(display.summary_lines(approximation(2.0, 3.0)))
    for part in (
        "a 6x6 matrix in float64",
        "1 kron(2x2, 3x3)",
        "13, 36.1% of the 36",
        "2 (relative: 2)",
        "spectral 3, Frobenius 3",
        "converged; 40 products; 0.50 s, and 1.50 s to compile",
    ):
        assert part in text
    assert "gap" not in text and "notes" not in text
    batch = approximation([1.0, 2.0, 6.0], [3.0, 3.0, 3.0], status=np.array([0, 2, 0]))
    batch = dataclasses.replace(batch, certificate=certificate([1.0, 2.0, 6.0]))
    text = "\n".join(display.summary_lines(batch))
    for part in (
        "3 matrices of 6x6",
        "median 2, worst 6 (relative: median 2, worst 6)",
        "converged (2), max_steps (1); 40 products per matrix",
        "medians: spectral 3, Frobenius 3",
        "median 0.2 %, worst 0.6 % of the error, at most",
    ):
        assert part in text


def test_certificates_print_bounds_and_explain_them():
    for errors, second in ((1.0, ""), ([1.0] * 50, "not proven")):
        found = certificate(errors, second)
        check_text(str(found))
        assert "at most" in str(found) and "error / bound" in str(found)
        assert ("second order" in str(found)) == bool(second)
        assert Cells(found._repr_html_()).texts[0].startswith("Certificate")
    mixed = dataclasses.replace(
        certificate([1.0, 2.0]),
        second_order=np.array(["not proven", "strict local minimum"], object),
    )
    assert "not proven (1), strict local minimum (1)" in str(mixed)
    none = dataclasses.replace(certificate(1.0), global_bound=np.float64(0))
    assert "bound" not in str(none).replace("local bound", "")


def test_a_finish_prints_its_status_and_no_factors():
    terms = KroneckerTerms(np.eye(2)[None], np.eye(2)[None])
    found = newton.finish(np.diag([1.0, 0, 0, 1]) + 0.1, (terms,))
    check_text(str(found))
    assert found.status in str(found)


def test_a_search_prints_the_best_sum_and_a_table_of_trials():
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    found = search(matrix, 48, norm="frobenius", num_starts=1, progress=False)
    check_text(str(found))
    best = found.trials[0]
    assert f"best of {len(found.trials)} sums for a 12x12 matrix" in str(found)
    assert best.kind in str(found) and f"{best.error:.5g}" in str(found)
    texts = Cells(found._repr_html_()).texts
    assert len(texts) == 1 + 6 * (1 + len(found.trials))
    assert len(repr(best).splitlines()) == 1


def test_a_permutation_prints_how_much_it_moves():
    rng = np.random.default_rng(0)
    matrix = np.kron(rng.normal(size=(2, 3)), rng.normal(size=(3, 2)))
    found = permute(matrix[[1, 0, 2, 3, 4, 5]], Configuration((2, 3), 1))
    check_text(str(found))
    moved = np.sum(found.rows != np.arange(6))
    assert f"{moved} of 6 moved" in str(found)


def test_terms_print_shapes_whatever_the_leaves_are():
    terms = KroneckerTerms(np.zeros((5, 3, 2, 2)), np.zeros((5, 3, 4, 4), np.float32))
    expected = "KroneckerTerms(a=float64[5, 3, 2, 2], b=float32[5, 3, 4, 4])"
    assert repr(terms) == str(terms) == expected
    assert repr(jax.tree.map(lambda x: None, terms)) == "KroneckerTerms(a=None, b=None)"
    shapes = jax.eval_shape(lambda x: x, terms)
    assert repr(shapes) == expected
    assert eval(repr(Configuration((2, 3), 4))) == Configuration((2, 3), 4)


def test_baselines_print_no_arrays():
    check_text(str(baseline(np.ones(40))))
    check_text(str(baseline(1.0)))
