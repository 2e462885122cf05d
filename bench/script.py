"""Helpers of the scripts: arguments, progress, targets, tables, figures, results."""

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
    """A measured value with its limit.

    Attributes:
        what: The name of the quantity.
        value: The measured value.
        limit: The limit that the value has to keep.
        at_least: Whether the limit is a lower one.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self):
        """Whether the value keeps the limit, or equals it."""
        wanted = self.value >= self.limit if self.at_least else self.value <= self.limit
        return bool(wanted)

    def plain(self):
        """Return the fields, and `met`, as a dictionary."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Solved:
    """A solve whose compilation and running were timed separately.

    Attributes:
        approximation: The result of `kronjax.approximate`.
        seconds: Median of the runs.
        runs: Seconds of each run that counts.
        compile_seconds: Seconds of tracing and compiling; 0 if an earlier solve did it.
    """

    approximation: Approximation
    seconds: float
    runs: list[float]
    compile_seconds: float


def solve(matrices, configuration, *, repeats=3, enough=4.0, **keywords):
    """Run `kronjax.approximate` several times if it is quick, and time it warm.

    Args:
        matrices: `[..., m, n]`.
        configuration: A `kronjax.Configuration`.
        repeats: Largest number of runs that count.
        enough: Seconds after which no further run is started. A first run that took
            at least as long counts; a shorter one does not, as it includes loading.
        **keywords: Further arguments of `kronjax.approximate`.
    """
    keywords = {"progress": False, **keywords}
    approximation = approximate(matrices, configuration, **keywords)
    compiling = approximation.compile_seconds
    runs = [approximation.seconds] if approximation.seconds >= enough else []
    while len(runs) < repeats and sum(runs) < enough:
        approximation = approximate(matrices, configuration, **keywords)
        runs.append(approximation.seconds)
    return Solved(approximation, float(np.median(runs)), runs, compiling)


@dataclass(frozen=True)
class Alone:
    """Results for matrices that one program solved one after the other.

    Attributes:
        runs: Seconds of each solve.
        proofs: Seconds of each proof, by a separate program that proves what the pools
            prove.
        errors: Spectral errors of the sums, in float64.
        gaps: Proven relative gaps.
        efforts: Steps, exponents and products of each solve, named as in the records of
            runs.
        compile_seconds: Seconds of tracing and compiling.
        blas_threads: Number of BLAS threads that was faster; None is the default.
    """

    runs: list[float]
    proofs: list[float]
    errors: list[float]
    gaps: list[float]
    efforts: list[dict]
    compile_seconds: float
    blas_threads: int | None


def solve_alone(matrices, configuration, tolerance):
    """Solve and prove matrices one after the other by a jitted `kronjax.solve`, warm.

    Args:
        matrices: `[m, n]` each.
        configuration: A `kronjax.Configuration`.
        tolerance: Tolerance of the solves.
    """
    problem = Problem.of(matrices[0].shape, configuration, num_starts=1)

    def solve_matrix(matrix):
        path = solve_purely(matrix, configuration, num_starts=1, tolerance=tolerance)
        return path.terms, path.trace

    @jax.jit
    def prove(matrix, terms, last):
        p = pool_programs.proof_exponent(problem, last)
        rounds = pool_programs.proof_rounds(tolerance)
        return certify_stage(matrix, terms, p, rounds)

    on_device = [jax.device_put(matrix) for matrix in matrices]
    first = on_device[0]
    begun = time.perf_counter()
    program = jax.jit(solve_matrix).lower(first).compile()
    compiling = time.perf_counter() - begun
    terms, trace = program(first)
    jax.block_until_ready(prove(first, terms, trace.p[-1]))
    threads = timing.best_threads(lambda: jax.block_until_ready(program(first)))
    solved = []
    with timing.blas(threads):
        for matrix in on_device:
            begun = time.perf_counter()
            terms, trace = jax.block_until_ready(program(matrix))
            ended = time.perf_counter()
            bounds = jax.block_until_ready(prove(matrix, terms, trace.p[-1]))
            proven = time.perf_counter()
            solved.append((ended - begun, proven - ended, terms, trace, bounds))
    runs, proofs, sums, traces, bounds = zip(*solved, strict=True)
    say(
        f"one by one: {np.mean(runs):.4f} s each, and {np.mean(proofs):.4f} s to prove;"
        f" compiled in {compiling:.0f} s; BLAS threads: {threads or 'default'}"
    )
    return Alone(
        runs=list(runs),
        proofs=list(proofs),
        errors=[
            float(measure(np.asarray(matrix), terms).spectral)
            for matrix, terms in zip(matrices, sums, strict=True)
        ],
        gaps=[1 - float(bound.local_bound / bound.error) for bound in bounds],
        efforts=[
            {
                "steps": int(trace.steps.sum()),
                "p": np.unique(trace.p).tolist(),
                "products": int(trace.products.sum()),
            }
            for trace in traces
        ],
        compile_seconds=compiling,
        blas_threads=threads,
    )


def parser(doc):
    """Return the argument parser of a script, with `--quick` and `--out`."""
    summary = doc.strip().splitlines()[0]
    result = argparse.ArgumentParser(description=summary)
    result.add_argument(
        "--quick",
        action="store_true",
        help="run small matrices for seconds instead of minutes; proves nothing",
    )
    result.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the JSON file and the figure",
    )
    return result


def say(text):
    """Print progress at once, with the seconds since the script began."""
    print(f"[{time.perf_counter() - BEGUN:4.0f} s] {text}", flush=True)


def table(title, header, rows):
    """Print rows in columns; words are aligned left, numbers right."""
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
    """Return the word for a condition."""
    return "yes" if condition else "NO"


def figure(width, height, rows=1, columns=1, **keywords):
    """Return a figure and its axes, [rows, columns], without pyplot's global state."""
    chart = Figure(figsize=(width, height), layout="constrained")
    axes = chart.subplots(rows, columns, squeeze=False, **keywords)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return chart, axes


def publish(name, results, chart, out):
    """Write `name.json`, with facts about the machine, and `name.png`."""
    path = timing.write_results(name, {"machine": timing.machine(), **results}, out)
    picture = path.with_suffix(".png")
    FigureCanvasAgg(chart).print_png(picture)
    say(f"written: {path} and {picture}")


def _cell(value):
    return f"{value:.5g}" if isinstance(value, float | np.floating) else str(value)
