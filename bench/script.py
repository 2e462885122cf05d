"""What the scripts share: arguments, progress, targets, tables, figures, results."""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import timing
from kronjax import solve as solve_purely
from kronjax.approximation import Approximation, approximate
from kronjax.linalg.residuals import measure
from kronjax.proof.bounds import certify_stage
from kronjax.runs import pool_programs
from kronjax.solver.problem import Problem

BEGUN = time.perf_counter()

COLORS = {"kronjax": "tab:blue", "SVD": "tab:orange", "Van Loan": "tab:gray"}
"""The same method has the same colour in every figure."""


@dataclass(frozen=True)
class Target:
    """A figure to be reached.

    Attributes:
        what: What is measured.
        value: What came out.
        limit: What was asked for.
        at_least: Whether larger is better.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self):
        """Whether the value is on the right side of the limit, or on it."""
        wanted = self.value >= self.limit if self.at_least else self.value <= self.limit
        return bool(wanted)

    def plain(self):
        """Everything as a dictionary."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Solved:
    """A solve whose compilation and running were timed apart.

    Attributes:
        approximation: What `kronjax.approximate` returned.
        seconds: Median of the runs.
        runs: Seconds of each run that counts.
        compile_seconds: Tracing and compiling, once; 0 when done for a solve before.
    """

    approximation: Approximation
    seconds: float
    runs: list[float]
    compile_seconds: float


def solve(matrices, configuration, *, repeats=3, enough=4.0, **keywords):
    """Run `kronjax.approximate`, again while that is quick, and time it warm.

    Args:
        matrices: `[..., m, n]`.
        configuration: A `kronjax.Configuration`.
        repeats: How many runs count, at most.
        enough: Seconds after which no further run is started. A first run that took
            as long counts itself; a shorter one, which pays for loading, does not.
        **keywords: Passed on.
    """
    keywords = {"progress": False, **keywords}
    found = approximate(matrices, configuration, **keywords)
    compiling = found.compile_seconds
    runs = [found.seconds] if found.seconds >= enough else []
    while len(runs) < repeats and sum(runs) < enough:
        found = approximate(matrices, configuration, **keywords)
        runs.append(found.seconds)
    return Solved(found, float(np.median(runs)), runs, compiling)


@dataclass(frozen=True)
class Alone:
    """Matrices solved one after the other, by one program.

    Attributes:
        runs: Seconds of each.
        proofs: Seconds that the proofs of pools take for what was found, by a program
            of their own.
        errors: Spectral errors of what was found, in float64.
        gaps: What was proven, relatively.
        efforts: Steps, exponents and products of each, as records of runs have them.
        compile_seconds: Tracing and compiling, once.
    """

    runs: list[float]
    proofs: list[float]
    errors: list[float]
    gaps: list[float]
    efforts: list[dict]
    compile_seconds: float


def solve_alone(matrices, configuration, tolerance):
    """Solve matrices by a jitted `kronjax.solve` one after the other, warm; then prove.

    Args:
        matrices: `[m, n]` each.
        configuration: A `kronjax.Configuration`.
        tolerance: Of the solves.
    """
    problem = Problem.of(matrices[0].shape, configuration, num_starts=1)

    def one(matrix):
        found = solve_purely(matrix, configuration, num_starts=1, tolerance=tolerance)
        return found.terms, found.trace

    @jax.jit
    def prove(matrix, terms, last):
        p, rounds = (
            pool_programs.proof_exponent(problem, last),
            pool_programs.proof_rounds(tolerance),
        )
        return certify_stage(matrix, terms, p, rounds)

    some = [jax.device_put(matrix) for matrix in matrices]
    begun = time.perf_counter()
    program = jax.jit(one).lower(some[0]).compile()
    compiling = time.perf_counter() - begun
    terms, trace = program(some[0])
    jax.block_until_ready(prove(some[0], terms, trace.p[-1]))
    told = []
    for matrix in some:
        begun = time.perf_counter()
        terms, trace = jax.block_until_ready(program(matrix))
        solved = time.perf_counter()
        bounds = jax.block_until_ready(prove(matrix, terms, trace.p[-1]))
        proven = time.perf_counter()
        told.append((solved - begun, proven - solved, terms, trace, bounds))
    runs, proofs, sums, traces, bounds = zip(*told, strict=True)
    say(
        f"one by one: {np.mean(runs):.4f} s each, and {np.mean(proofs):.4f} s to prove;"
        f" compiled in {compiling:.0f} s"
    )
    return Alone(
        runs=list(runs),
        proofs=list(proofs),
        errors=[
            float(measure(np.asarray(matrix), terms).spectral)
            for matrix, terms in zip(matrices, sums, strict=True)
        ],
        gaps=[1 - float(one.local_bound / one.error) for one in bounds],
        efforts=[
            {
                "steps": int(one.steps.sum()),
                "p": np.unique(one.p).tolist(),
                "products": int(one.products.sum()),
            }
            for one in traces
        ],
        compile_seconds=compiling,
    )


def parser(doc):
    """The command line of a script: `--quick` and `--out`; a script may add more."""
    summary = doc.strip().splitlines()[0]
    result = argparse.ArgumentParser(description=summary)
    result.add_argument(
        "--quick",
        action="store_true",
        help="seconds instead of minutes: small matrices, no claim attached",
    )
    result.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON file and the figure",
    )
    return result


def say(text):
    """Report progress at once, with the seconds since the script began."""
    print(f"[{time.perf_counter() - BEGUN:4.0f} s] {text}", flush=True)


def table(title, header, rows):
    """Print rows in columns, words to the left and numbers to the right."""
    cells = [[str(x) for x in header], *([_cell(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    columns = zip(*cells[1:], strict=True)
    words = [any(cell[:1].isalpha() for cell in column) for column in columns]
    for row in cells:
        parts = (
            cell.ljust(width) if is_words else cell.rjust(width)
            for cell, width, is_words in zip(row, widths, words, strict=True)
        )
        print("  ".join(parts).rstrip())
    print(flush=True)


def print_targets(targets):
    """Print every target and whether it is met."""
    rows = [
        (t.what, t.value, f"{'>=' if t.at_least else '<='} {t.limit:.5g}", yes(t.met))
        for t in targets
    ]
    if rows:
        table("Targets", ("what", "value", "target", "met"), rows)


def yes(condition):
    """The word for a condition."""
    return "yes" if condition else "NO"


def figure(width, height, rows=1, columns=1, **keywords):
    """A figure and its axes, [rows, columns], without pyplot's global state."""
    chart = Figure(figsize=(width, height), layout="constrained")
    axes = chart.subplots(rows, columns, squeeze=False, **keywords)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return chart, axes


def publish(name, results, chart, out):
    """Write `name.json`, with the machine and its state, and `name.png`."""
    path = timing.write_results(name, {"machine": timing.machine(), **results}, out)
    picture = path.with_suffix(".png")
    FigureCanvasAgg(chart).print_png(picture)
    say(f"written: {path} and {picture}")


def _cell(value):
    return f"{value:.5g}" if isinstance(value, float | np.floating) else str(value)
