"""Cost of spectral norms with two-sided bounds, compared with singular values.

72 matrices have the shapes of OPT-125M (48 of 768 x 768, 12 of 3072 x 768, 12 of
768 x 3072) in float32: real ones from `--weights` first, then random ones with singular
values `i^-a`, `0.4 <= a <= 1`, in random directions, plus white noise of norm 0.1 to
0.5.  The methods are `kronjax.linalg.norms.norm_bounds`, whose bounds are certain,
`kronjax.linalg.lanczos.map_norm_bounds`, whose upper bound fails with probability 1e-9,
and two without bounds: all singular values by `jnp.linalg.svd`, and the Gram matrix
with `jnp.linalg.eigvalsh`.  Each runs with as many BLAS threads as is faster.  The
reference is NumPy's SVD in float64.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import script, timing
from kronjax.io import matrices
from kronjax.linalg import lanczos, norms

WIDTH = 1e-3
FAILURE = 1e-9


@dataclass(frozen=True)
class Experiment:
    """Number of matrices of each shape, `(count, m, n)`, and of timed rounds."""

    shapes: tuple[tuple[int, int, int], ...] = (
        (48, 768, 768),
        (12, 3072, 768),
        (12, 768, 3072),
    )
    rounds: int = 5


QUICK = Experiment(shapes=((3, 48, 48), (2, 96, 48), (2, 48, 96)), rounds=1)


def random_matrix(rng, shape):
    """Draw a matrix with decaying singular values in random directions, and noise."""
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    decay = np.arange(1, k + 1) ** -rng.uniform(0.4, 1)
    noise = rng.standard_normal(shape) / sum(np.sqrt(shape))
    return ((u * decay) @ v.T + rng.uniform(0.1, 0.5) * noise).astype(np.float32)


def real_matrices(path):
    """Return attention weights of GPT-2 small by name."""
    parts_by_name = {}
    for layer in range(12):
        name = f"h.{layer}.attn"
        try:
            joint = matrices.read(path, tensor=f"{name}.c_attn.weight").matrix
            last = matrices.read(path, tensor=f"{name}.c_proj.weight").matrix
        except (KeyError, ValueError):
            continue  # a file may lack layers
        parts = [*np.split(joint, 3, axis=1), last]
        names = ("query", "key", "value", "output")
        for part, each in zip(names, parts, strict=True):
            parts_by_name[f"layer {layer} {part}"] = np.ascontiguousarray(
                each, np.float32
            )
    return parts_by_name


def draw_groups(experiment, real):
    """Return names and matrices `[count, m, n]` for each shape."""
    rng = np.random.default_rng(0)
    groups = []
    for count, *shape in experiment.shapes:
        named = [
            (name, matrix) for name, matrix in real.items() if [*matrix.shape] == shape
        ][:count]
        for i in range(count - len(named)):
            named.append((f"random {i}", random_matrix(rng, shape)))
        names, matrices = zip(*named, strict=True)
        groups.append((names, np.stack(matrices)))
    return groups


def certain(matrices):
    """Return deterministic bounds, one matrix after the other."""

    def bounds(matrix):
        norm = norms.norm_bounds(matrix, width=WIDTH)
        return norm.lower, norm.upper

    return jax.lax.map(bounds, matrices)


def probable(matrices):
    """Return bounds that need only products with vectors."""

    def bounds(given):
        matrix, key = given
        norm = lanczos.map_norm_bounds(
            lambda x: jnp.matmul(matrix, x, precision="highest"),
            lambda y: jnp.matmul(y, matrix, precision="highest"),
            jax.random.normal(key, matrix.shape[1:], matrix.dtype),
            width=WIDTH,
            failure=FAILURE,
        )
        return norm.lower, norm.upper

    return jax.lax.map(
        bounds, (matrices, jax.random.split(jax.random.key(1), len(matrices)))
    )


def singular_values(matrices):
    """Return all singular values, as a batch, which is faster than a loop."""
    return jnp.linalg.svd(matrices, compute_uv=False)


def gram_eigenvalues(matrices):
    """Return the eigenvalues of the smaller Gram matrices, as a batch."""
    flipped = matrices.mT
    pair = (flipped, matrices) if matrices.shape[1] >= matrices.shape[2] else None
    left, right = pair or (matrices, flipped)
    return jnp.linalg.eigvalsh(jnp.matmul(left, right, precision="highest"))


METHODS = {
    "kronjax, certain": certain,
    "kronjax, probable": probable,
    "Gram + eigvalsh": gram_eigenvalues,
    "svd": singular_values,
}


def race(groups, rounds):
    """Time each method over all groups, the methods in turns.

    Returns:
        Seconds of all rounds, seconds of compiling, numbers of BLAS threads, and the
        last results, each by method.
    """
    inputs = [jax.device_put(matrices) for _, matrices in groups]
    programs, compiling, threads, results = {}, {}, {}, {}
    for name, method in METHODS.items():
        script.say(f"compiling: {name}")
        begun = time.perf_counter()
        # A new jitted function for each shape, so that methods share no traces.
        programs[name] = [jax.jit(method).lower(x).compile() for x in inputs]
        compiling[name] = time.perf_counter() - begun
        threads[name] = timing.best_threads(lambda n=name: run(programs[n], inputs))
    seconds = {name: [] for name in METHODS}
    for i in range(rounds):
        script.say(f"round {i + 1} of {rounds}")
        for name in METHODS:
            with timing.blas(threads[name]):
                begun = time.perf_counter()
                results[name] = run(programs[name], inputs)
                seconds[name].append(time.perf_counter() - begun)
    return seconds, compiling, threads, results


def run(programs, inputs):
    """Run the program of each shape, one after the other."""
    return [
        jax.block_until_ready(program(x))
        for program, x in zip(programs, inputs, strict=True)
    ]


def judge(groups, results):
    """Return a row for each matrix, with its norm and both pairs of bounds."""
    rows = []
    for i, (names, group) in enumerate(groups):
        bounds = {
            kind: np.array(results[f"kronjax, {kind}"][i], np.float64)
            for kind in ("certain", "probable")
        }
        for j, (name, matrix) in enumerate(zip(names, group, strict=True)):
            s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
            row = {"name": name, "shape": matrix.shape, "norm": s[0]}
            row["stable_rank"] = np.sum(s**2) / s[0] ** 2
            row["second"] = s[1] / s[0]
            for kind, (lower, upper) in bounds.items():
                row[f"lower_{kind}"], row[f"upper_{kind}"] = lower[j], upper[j]
                row[f"width_{kind}"] = upper[j] / lower[j] - 1
                row[f"wrong_{kind}"] = not lower[j] <= s[0] <= upper[j]
            rows.append(row)
    return rows


def targets_of(rows, ratios):
    """Return the targets of both kinds of bounds."""
    targets = []
    for kind in ("certain", "probable"):
        unit = ratios[f"kronjax, {kind}"]
        wrong = sum(row[f"wrong_{kind}"] for row in rows)
        widest = max(row[f"width_{kind}"] for row in rows)
        targets += [
            script.Target(f"{kind}: widest bounds", widest, WIDTH),
            script.Target(f"{kind}: wrong sides", wrong, 0),
            script.Target(f"{kind}: svd / bounds", ratios["svd"] / unit, 4, True),
            script.Target(
                f"{kind}: Gram + eigvalsh / bounds",
                ratios["Gram + eigvalsh"] / unit,
                1,
                True,
            ),
        ]
    return targets


def draw(rows, seconds):
    """Draw bounds relative to the norm, and times over that of the certain bounds."""
    chart, ((left, right),) = script.figure(11, 4.2, columns=2)
    order = np.argsort([row["width_certain"] for row in rows])
    for kind, color in (("certain", "tab:blue"), ("probable", "tab:cyan")):
        for side, sign in (("lower", -1), ("upper", 1)):
            away = [
                sign * (rows[i][f"{side}_{kind}"] / rows[i]["norm"] - 1) for i in order
            ]
            label = kind if side == "upper" else None
            left.plot(sign * np.maximum(away, 0), color=color, marker=".", label=label)
    left.axhline(0, color="black", linestyle=":")
    left.set(xlabel="matrix", ylabel="bound / norm - 1", title="lower and upper bounds")
    left.legend(frameon=False)
    unit = np.median(seconds["kronjax, certain"])
    right.barh(list(seconds), [np.median(x) / unit for x in seconds.values()])
    right.invert_yaxis()
    right.set(
        xlabel="time over that of the certain bounds", title=f"{len(rows)} matrices"
    )
    return chart


def main():
    """Run the benchmark, and write `spectral_norms.json` and `spectral_norms.png`."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--weights", type=Path, help="GPT-2 small as .safetensors, some layers or all"
    )
    given = parser.parse_args()
    experiment = QUICK if given.quick else Experiment()
    real = real_matrices(given.weights) if given.weights else {}
    if given.weights and not real:
        parser.error(f"{given.weights} holds no h.*.attn.c_attn.weight")
    groups = draw_groups(experiment, real)
    used = sum(not name.startswith("random") for names, _ in groups for name in names)
    seconds, compiling, threads, results = race(groups, experiment.rounds)
    script.say("singular values in float64")
    rows = judge(groups, results)
    # Ratios are taken within each round, as the load of the machine changes slowly.
    base = np.array(seconds["kronjax, certain"])
    ratios = {name: float(np.median(np.array(x) / base)) for name, x in seconds.items()}
    script.table(
        f"{len(rows)} matrices, {used} of them real: time over that of certain bounds",
        ("method", "time", "widest", "median width"),
        [
            (name, ratios[name], *widths(rows, name.removeprefix("kronjax, ")))
            for name in METHODS
        ],
    )
    targets = targets_of(rows, ratios)
    script.print_targets(targets)
    report = {
        "quick": given.quick,
        "real": used,
        "targets": [target.plain() for target in targets],
        "ratios": ratios,
        "seconds": seconds,
        "compile_seconds": compiling,
        "blas_threads": threads,
        "failure": FAILURE,
        "matrices": rows,
    }
    script.publish("spectral_norms", report, draw(rows, seconds), given.out)


def widths(rows, kind):
    """Return the widest and the median width of bounds, or "-" without bounds."""
    if f"width_{kind}" not in rows[0]:
        return "-", "-"
    values = [row[f"width_{kind}"] for row in rows]
    return max(values), float(np.median(values))


if __name__ == "__main__":
    main()
