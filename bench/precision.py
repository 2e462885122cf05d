"""Precision that matrix products need, and the speed of less precise ones.

The script is meant for a GPU, whose tensor cores multiply float32 matrices by rounding
the factors (TF32 to 10 bits, bfloat16 to 7) or by splitting them (x3, x6: the sum of so
many products of parts).  For every p of the continuation it measures the relative error
of value and gradient in each mode, on random matrices and on residuals of solutions,
against singular values in float64.  A stage ends where a model predicts a relative
decrease below `tolerance / 200`; a gradient with a relative error `e` predicts spurious
decreases of `e^2`.  So a mode is certainly precise enough if the error of the value is
below `tolerance / 200` and that of the gradient below its root.  Errors that neighbours
share are harmless, and so whole solves are measured as well, in which all stages up to
some p use a mode: for how many is the gap, proven in float64, within the tolerance?

Without a GPU the modes are emulated by rounding and splitting factors in float32, sizes
are small, and no mode is timed.  Output and JSON say so.
"""

from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import script, timing
from bench.products import MODES, is_gpu, multiplier
from kronjax import Configuration, approximate
from kronjax.linalg import schatten
from kronjax.norm import MAX_SQUARINGS
from kronjax.proof import certificate
from kronjax.solver import continuation

TOLERANCE = 2e-4
"""Default tolerance of a solve."""

NEEDED = {"value": TOLERANCE / 200, "gradient": (TOLERANCE / 200) ** 0.5}

TOP = MAX_SQUARINGS
STAGES = range(TOP + 1)

EXACT = schatten.value_and_gradient


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices, which are square, as are the factors.

    Attributes:
        side: Side of the matrices whose gradients are compared; a square number.
        count: Number of matrices of each kind.
        solved: Number of 36x36 matrices that are solved and proven in each mode.
        limits: Numbers of squarings up to which these solves use a mode.
        modes: Modes of these solves.
    """

    side: int = 256
    count: int = 3
    solved: int = 12
    limits: tuple[int, ...] = (3, 7, TOP)
    modes: tuple[str, ...] = tuple(MODES)


ON_GPU = Experiment(side=576, solved=24)
QUICK = Experiment(side=36, count=1, solved=2, limits=(TOP,), modes=("float32", "tf32"))


def evaluation(mode):
    """Return `schatten.value_and_gradient` with products in a mode."""
    multiply = multiplier(mode)

    def value_and_gradient(matrix, squarings):
        with mock.patch.object(schatten, "_product", multiply):
            return EXACT(matrix, squarings)

    return value_and_gradient


def draw(count, side):
    """Draw matrices with normal entries, float32."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, side, side)).astype(np.float32)


def configuration_of(side, rank=3):
    """Return square factors for a side that is a square number."""
    k = round(side**0.5)
    return Configuration((k, k), rank)


def kinds_of(experiment):
    """Return matrices by kind: random ones, and residuals of their solutions."""
    random = draw(experiment.count, experiment.side)
    script.say("residuals of solutions")
    solved = approximate(
        random, configuration_of(experiment.side), dtype="float32", progress=False
    )
    return {"random": random, "solved": random - solved.matrix()}


def references(matrix):
    """Yield value and gradient for every p, from singular values in float64."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64))
    for j in STAGES:
        p = float(schatten.exponent(j))
        norm = s[0] * np.sum((s / s[0]) ** p) ** (1 / p)
        yield norm**2 / 2, norm * (u * (s / norm) ** (p - 1)) @ vt


def compare(kinds):
    """Return the largest relative errors for each kind, mode and p."""
    rows = []
    for kind, matrices in kinds.items():
        exact = [list(references(matrix)) for matrix in matrices]
        for name, mode in MODES.items():
            script.say(f"{kind} matrices, products in {name}")
            program = jax.jit(evaluation(mode))
            for j in STAGES:
                errors = {"value": [], "gradient": []}
                for matrix, known in zip(matrices, exact, strict=True):
                    value, gradient = jax.device_get(program(matrix, j))
                    right, slope = known[j]
                    off = np.linalg.norm(gradient - slope) / np.linalg.norm(slope)
                    errors["value"].append(abs(value / right - 1))
                    errors["gradient"].append(off)
                worst = {what: float(max(each)) for what, each in errors.items()}
                p = int(schatten.exponent(j))
                rows.append({"kind": kind, "mode": name, "p": p, **worst})
    return rows


def served(rows):
    """Return the largest p up to which a mode is precise enough; 0 if there is none."""
    largest = {}
    for name in MODES:
        mine = [row for row in rows if row["mode"] == name]
        largest[name] = {}
        for what, limit in NEEDED.items():
            first = min((row["p"] for row in mine if row[what] > limit), default=np.inf)
            good = [row["p"] for row in mine if row["p"] < first]
            largest[name][what] = max(good, default=0)
    return largest


def solver(mode, configuration):
    """Return a solver of batches with a mode up to some number of squarings."""
    rough = evaluation(mode)

    def run(matrices, limit):
        def value_and_gradient(matrix, squarings):
            return jax.lax.cond(squarings <= limit, rough, EXACT, matrix, squarings)

        def solve(matrix):
            return continuation.solve(matrix, configuration, tolerance=TOLERANCE)

        with mock.patch.object(schatten, "value_and_gradient", value_and_gradient):
            return jax.vmap(solve)(matrices)

    return jax.jit(run)


def prove(experiment):
    """Return the proven gaps of whole solves for each mode and limit."""
    matrices, rows = draw(experiment.solved, 36), []
    for name in experiment.modes:
        program = solver(MODES[name], configuration_of(36))
        for limit in experiment.limits if name != "float32" else (TOP,):
            p = int(schatten.exponent(limit))
            script.say(f"solving: {name} up to p = {p}")
            solved = jax.device_get(program(matrices, limit))
            proven = certificate.certificate_of(matrices, solved.terms)
            rows.append(
                {
                    "mode": name,
                    "up_to_p": p,
                    "errors": proven.error,
                    "gaps": proven.local_gap,
                    "median_gap": float(np.median(proven.local_gap)),
                    "within": int(np.sum(proven.local_gap <= TOLERANCE)),
                    "products": int(solved.trace.products.sum()),
                }
            )
    for row in rows:  # the first is float32
        row["excess"] = float(np.median(row["errors"] / rows[0]["errors"]) - 1)
    return rows


def speeds(experiment):
    """Return the time of an evaluation in float32 over that in each mode, on a GPU."""
    if not is_gpu():
        return {}
    matrices = jnp.asarray(draw(48, experiment.side))
    best = {}
    for name, mode in MODES.items():
        evaluate = evaluation(mode)
        program = jax.jit(jax.vmap(lambda x, evaluate=evaluate: evaluate(x, TOP)))
        best[name] = timing.measure(program, matrices).best
    return {name: best["float32"] / seconds for name, seconds in best.items()}


def targets_of(rows):
    """Return the targets, which apply to float32."""
    exact = [row for row in rows if row["mode"] == "float32"]
    return [
        script.Target(f"float32: error of the {what}", max(r[what] for r in exact), x)
        for what, x in NEEDED.items()
    ]


def chart_of(rows, proven):
    """Draw errors of gradients against p, and proven gaps of whole solves."""
    chart, ((left, right),) = script.figure(11, 4.2, columns=2)
    for name, mode in MODES.items():
        mine = [row for row in rows if (row["mode"], row["kind"]) == (name, "solved")]
        p, errors = ([row[key] for row in mine] for key in ("p", "gradient"))
        left.loglog(p, errors, color=mode.color, marker=".", label=name)
    left.axhline(NEEDED["gradient"], color="black", linestyle=":")
    left.set(xlabel="p", ylabel="relative error", title="gradient where it is solved")
    left.set_ylim(top=100)  # room for the legend
    left.legend(frameon=False, ncols=3, loc="upper left")
    for name, mode in MODES.items():
        mine = [row for row in proven if row["mode"] == name]
        p, gaps = ([row[key] for row in mine] for key in ("up_to_p", "median_gap"))
        right.loglog(p, gaps, color=mode.color, marker="o", label=name)
    right.axhline(TOLERANCE, color="black", linestyle=":")
    right.set(xlabel="in a mode up to p", title="median certified gap, 36x36")
    return chart


def show(rows, proven, faster, serves):
    """Print the tables."""
    errors = {(row["kind"], row["mode"], row["p"]): row for row in rows}
    exponents = sorted({row["p"] for row in rows})
    for what, limit in NEEDED.items():
        for kind in ("random", "solved"):
            script.table(
                f"{kind} matrices: relative error of the {what}; needed: {limit:.1g}",
                ("p", *MODES),
                [(p, *(errors[kind, m, p][what] for m in MODES)) for p in exponents],
            )
    script.table(
        "Certainly precise enough up to p",
        ("mode", *NEEDED, "times faster"),
        [
            (name, *p.values(), faster.get(name, "not timed"))
            for name, p in serves.items()
        ],
    )
    columns = ("mode", "up_to_p", "within", "median_gap", "excess", "products")
    script.table(
        f"Whole solves, 36x36: gaps within {TOLERANCE:g} of {len(proven[0]['gaps'])}, "
        "median error over float32's, less one",
        columns,
        [[row[column] for column in columns] for row in proven],
    )


def main():
    """Run the benchmark, and write `precision.json` and `precision.png`."""
    given = script.parser(__doc__).parse_args()
    experiment = QUICK if given.quick else ON_GPU if is_gpu() else Experiment()
    where = jax.devices()[0].device_kind
    note = f"run on a GPU: {where}"
    if not is_gpu():
        note = f"NOT RUN ON A GPU but on {where}: modes are emulated and not timed"
    script.say(note)
    rows = compare(kinds_of(experiment))
    proven = prove(experiment)
    faster, serves = speeds(experiment), served(rows)
    show(rows, proven, faster, serves)
    targets = targets_of(rows)
    script.print_targets(targets)
    script.say(note)
    report = {
        "quick": given.quick,
        "on_gpu": is_gpu(),
        "emulated": not is_gpu(),
        "note": note,
        "side": experiment.side,
        "tolerance": TOLERANCE,
        "needed": NEEDED,
        "serves_up_to": serves,
        "times_faster": faster,
        "targets": [target.plain() for target in targets],
        "errors": rows,
        "proven": proven,
    }
    script.publish("precision", report, chart_of(rows, proven), given.out)


if __name__ == "__main__":
    main()
