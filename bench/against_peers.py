"""Speed and errors of kronjax and its peers on fifty random matrices.

The matrices are 36 x 36 with N(0, 1) entries, the factors 6 x 6.  kronjax solves all of
them as one batch, at four settings and in two precisions, compilation timed separately;
the peers loop over them one by one in float64, with as many BLAS threads as is faster.
Slow peers loop over the first few matrices, and their time is scaled to fifty: the JSON
says how many were run.  Errors are compared on the matrices that were run; "relative"
is the mean ratio of the error to that of kronjax at its defaults for the same matrix,
so that few matrices say as much as many.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench import peers, script, timing
from kronjax import Configuration

SPEEDUP = 50
"""Target: this many times faster, with a lower error on every matrix."""

SETTINGS = {
    "defaults": {},
    "num_starts=1, tolerance=2e-3": {"num_starts": 1, "tolerance": 2e-3},
    "num_starts=1, tolerance=0.2": {
        "num_starts": 1,
        "tolerance": 0.2,
        "schedule": "fixed",
    },
    "the same to p = 258": {"num_starts": 1, "tolerance": 0.2, "norm": "schatten:258"},
}

HALF_SWEEPS = 10


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices."""

    matrices: int = 50
    size: int = 36
    factor: int = 6
    ranks: tuple[int, ...] = (6, 3, 1)
    dtypes: tuple[str, ...] = ("float32", "float64")
    continuation_matrices: int = 10
    scs_matrices: int = 6
    clarabel_half_sweeps: int = 2

    @property
    def a_shape(self):
        return self.factor, self.factor


QUICK = Experiment(
    matrices=4,
    size=12,
    factor=3,
    ranks=(2,),
    dtypes=("float32",),
    continuation_matrices=2,
    scs_matrices=2,
)


@dataclass
class Peer:
    """A method, the number of matrices that it solves, and its results.

    Attributes:
        name: Printed name.
        run: Function from a matrix to a `PeerResult`.
        count: Number of matrices.
        rivals: Whether the target applies to it.
        stretch: Time of the whole task over time of the part that is run.
        note: Explanation of the scaling or of the choice.
    """

    name: str
    run: Callable[[np.ndarray], peers.PeerResult]
    count: int
    rivals: bool = True
    stretch: float = 1.0
    note: str = ""
    errors: list[float] = field(default_factory=list)
    run_seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    seconds: float = 0.0
    threads: int | None = 1

    def measure(self, matrices):
        script.say(f"  {self.name}, {self.count} matrices")
        # This also loads libraries; a partial run takes too long to be repeated.
        if self.stretch == 1:
            self.threads = timing.best_threads(lambda: self.run(matrices[0]))
        for matrix in matrices[: self.count]:
            with timing.blas(self.threads):
                result = self.run(matrix)
            self.errors.append(result.spectral_error)
            self.run_seconds.append(result.seconds)
            self.evaluations.append(result.evaluations)
        self.seconds = float(np.mean(self.run_seconds)) * len(matrices) * self.stretch

    def plain(self, reference):
        return {
            "seconds": self.seconds,
            "matrices_run": self.count,
            "measured_seconds": sum(self.run_seconds),
            "scaled_by": self.seconds / sum(self.run_seconds),
            "evaluations": self.evaluations,
            "blas_threads": self.threads,
            "is_partial": self.stretch != 1,
            "mean_error": float(np.mean(self.errors)),
            "relative_error": relative(self.errors, reference),
            "errors": self.errors,
            "note": self.note,
        }


def relative(errors, reference):
    """Return the mean ratio of errors to the reference, on the matrices that ran."""
    return float(np.mean(np.asarray(errors) / reference[: len(errors)]))


def peers_of(experiment, rank, with_clarabel):
    """Return all peers in the order in which they run."""
    given = experiment.a_shape, rank
    every = experiment.matrices
    parameters = rank * (
        experiment.factor**2 + (experiment.size // experiment.factor) ** 2
    )

    def pymanopt(name, count, note, **keywords):
        return Peer(
            name,
            lambda x: peers.pymanopt_fixed_rank(x, *given, **keywords),
            count,
            note=note,
        )

    def sdp(solver, half_sweeps):
        return lambda x: peers.alternating_sdp(x, *given, solver, half_sweeps)

    result = [
        Peer("SVD", lambda x: peers.truncated_svd(x, parameters), every, rivals=False),
        Peer("Van Loan", lambda x: peers.van_loan(x, *given), every, rivals=False),
        pymanopt(
            "pymanopt, p = 8", every, "the usual single surrogate", exponents=(8,)
        ),
        pymanopt(
            "pymanopt, p = 32", every, "the best single surrogate", exponents=(32,)
        ),
        pymanopt(
            "pymanopt, continued",
            experiment.continuation_matrices,
            "with the continuation of kronjax: p = 6 ... 4098, 100 iterations each; "
            "time scaled to all matrices",
            max_iterations=100,
        ),
        Peer(
            "SDP, SCS",
            sdp("SCS", HALF_SWEEPS),
            experiment.scs_matrices,
            note=f"{HALF_SWEEPS} half-sweeps; time scaled to all matrices",
        ),
    ]
    if with_clarabel:
        few = experiment.clarabel_half_sweeps
        result.append(
            Peer(
                "SDP, Clarabel",
                sdp("CLARABEL", few),
                1,
                stretch=HALF_SWEEPS / few,
                note=f"{few} half-sweeps on one matrix; time scaled to {HALF_SWEEPS} "
                "half-sweeps on all matrices, error as after those few",
            )
        )
    return result


def solve_all(experiment, matrices, rank):
    """Solve at every setting in every precision; return rows and reference errors."""
    configuration = Configuration(experiment.a_shape, rank)
    solves = {}
    for dtype in experiment.dtypes:
        for name, keywords in SETTINGS.items():
            script.say(f"  kronjax, {name}, {dtype}")
            solves[name, dtype] = script.solve(
                matrices, configuration, dtype=dtype, **keywords
            )
    best = solves["defaults", experiment.dtypes[-1]].approximation
    reference = np.asarray(best.error.spectral)
    return [_row(key, x, reference) for key, x in solves.items()], reference


def _row(key, solved, reference):
    name, dtype = key
    approximation = solved.approximation
    return {
        "setting": name,
        "dtype": dtype,
        "seconds": solved.seconds,
        "runs": solved.runs,
        "compile_seconds": solved.compile_seconds,
        "mean_products": float(np.mean(approximation.products)),
        "mean_error": float(np.mean(approximation.error.spectral)),
        "relative_error": relative(approximation.error.spectral, reference),
        "errors": approximation.error.spectral,
        "trace": {
            "p": approximation.trace.p[0],
            "mean_products": np.cumsum(approximation.trace.products, axis=1).mean(0),
            "relative_error": (
                approximation.trace.spectral_error / reference[:, None]
            ).mean(0),
        },
    }


def compare(row, peer):
    """Compare a setting of kronjax with a peer, on the matrices that the peer ran."""
    ours, theirs = np.asarray(row["errors"])[: peer.count], np.asarray(peer.errors)
    lower = int(np.sum(ours < theirs))
    ratio = peer.seconds / row["seconds"]
    return {
        "setting": row["setting"],
        "dtype": row["dtype"],
        "peer": peer.name,
        "times_faster": ratio,
        "lower_error_on": lower,
        "of": peer.count,
        "mean_error": float(np.mean(ours)),
        "peer_mean_error": float(np.mean(theirs)),
        "worst_error_ratio": float(np.max(ours / theirs)),
        "met": bool(ratio >= SPEEDUP and lower == peer.count),
    }


def run_rank(experiment, matrices, rank, with_clarabel):
    """Run kronjax and all peers at one rank."""
    script.say(f"rank {rank}")
    rows, reference = solve_all(experiment, matrices, rank)
    opponents = peers_of(experiment, rank, with_clarabel)
    for peer in opponents:
        peer.measure(matrices)
    rivals = [peer for peer in opponents if peer.rivals]
    sdps = [peer for peer in rivals if peer.name.startswith("SDP")]
    faster = min(sdps, key=lambda peer: peer.seconds)
    # Only the faster SDP solver counts, which is the one that ran all half-sweeps.
    rivals = [peer for peer in rivals if peer not in sdps or peer is faster]
    return {
        "rank": rank,
        "kronjax": rows,
        "peers": {peer.name: peer.plain(reference) for peer in opponents},
        "faster_sdp": faster.name,
        "comparisons": [compare(row, peer) for peer in rivals for row in rows],
    }


def print_rank(result, matrices):
    unit = min(row["seconds"] for row in result["kronjax"])
    rows = [
        (
            f"kronjax, {row['setting']}, {row['dtype']}",
            row["mean_error"],
            row["relative_error"],
            len(row["errors"]),
            f"{row['seconds'] / unit:.1f}",
            f"{row['mean_products']:.0f}",
        )
        for row in result["kronjax"]
    ] + [
        (
            name,
            peer["mean_error"],
            peer["relative_error"],
            peer["matrices_run"],
            f"{peer['seconds'] / unit:.1f}",
            "",
        )
        for name, peer in result["peers"].items()
    ]
    script.table(
        f"Rank {result['rank']}: {matrices} matrices, time over that of the fastest "
        "kronjax",
        ("method", "mean error", "relative", "matrices", "time", "products"),
        rows,
    )
    script.table(
        f"Rank {result['rank']}: kronjax against each peer; target: >= {SPEEDUP} times "
        "faster and lower error on every matrix",
        ("peer", "kronjax", "times faster", "lower on", "mean errors", "met"),
        [
            (
                each["peer"],
                f"{each['setting']}, {each['dtype']}",
                f"{each['times_faster']:.1f}",
                f"{each['lower_error_on']}/{each['of']}",
                f"{each['mean_error']:.4f} / {each['peer_mean_error']:.4f}",
                script.yes(each["met"]),
            )
            for each in result["comparisons"]
        ],
    )


def verdicts(result):
    """Return the settings that meet the target, for every peer."""
    met = {}
    for each in result["comparisons"]:
        met.setdefault(each["peer"], [])
        if each["met"]:
            met[each["peer"]].append(f"{each['setting']}, {each['dtype']}")
    return met


def draw(result, experiment):
    """Draw errors against products for kronjax, and against time for all methods."""
    chart, axes = script.figure(11, 4.8, columns=2, sharey=True)
    left, right = axes[0]
    unit = min(row["seconds"] for row in result["kronjax"])
    styles = dict(zip(SETTINGS, ("o", "s", "^", "v"), strict=True))
    colors = {"float32": "tab:blue", "float64": "tab:cyan"}
    for row in result["kronjax"]:
        label = f"kronjax, {row['setting']}, {row['dtype']}"
        style = {"color": colors[row["dtype"]], "marker": styles[row["setting"]]}
        path = row["trace"]
        left.plot(
            path["mean_products"][1:],
            path["relative_error"][1:],
            label=label,
            **style,
        )
        right.plot(
            row["seconds"] / unit,
            row["relative_error"],
            linestyle="",
            label=label,
            **style,
        )
    others = zip(
        ("x", "+", "1", "2", "*", "D", "P"), result["peers"].items(), strict=False
    )
    for marker, (name, peer) in others:
        color = script.COLORS.get(name, "tab:red" if "SDP" in name else "tab:green")
        if name in script.COLORS:
            left.axhline(peer["relative_error"], color=color, ls="--", label=name)
        label = name
        if peer["matrices_run"] < experiment.matrices:
            label += f" (scaled from {peer['matrices_run']})"
        if peer["is_partial"]:
            label += ", stopped early"
        right.plot(
            peer["seconds"] / unit,
            peer["relative_error"],
            linestyle="",
            marker=marker,
            markersize=8,
            color=color,
            label=label,
        )
    left.set_xscale("log")
    right.set_xscale("log")
    left.set_xlabel("products per matrix, all starts and rejected steps included")
    right.set_xlabel(
        f"time for {experiment.matrices} matrices over that of the fastest kronjax"
    )
    left.set_ylabel("spectral error over that of kronjax, defaults, mean")
    left.set_title("along the continuation, at the end of each stage", fontsize=10)
    right.set_title(
        "kronjax as one batch, compiled before; peers one by one", fontsize=10
    )
    left.legend(fontsize=7, frameon=False)
    right.legend(fontsize=7, frameon=False)
    chart.suptitle(
        f"{experiment.matrices} matrices {experiment.size}×{experiment.size}, N(0, 1), "
        f"rank {result['rank']}"
    )
    return chart


def main():
    """Run the benchmark, and write `against_peers.json` and `against_peers.png`."""
    given = script.parser(__doc__).parse_args()
    experiment = QUICK if given.quick else Experiment()
    shape = (experiment.matrices, experiment.size, experiment.size)
    matrices = np.random.default_rng(0).standard_normal(shape)
    results = []
    for i, rank in enumerate(experiment.ranks):
        results.append(run_rank(experiment, matrices, rank, with_clarabel=i == 0))
        print_rank(results[-1], experiment.matrices)
    met = verdicts(results[0])
    print(f"Rank {experiment.ranks[0]}, target met")
    for peer, settings in met.items():
        print(f"  against {peer}: {'; '.join(settings) or 'by no setting'}")
    chart = draw(results[0], experiment)
    published = {
        "quick": given.quick,
        "shape": shape,
        "a_shape": experiment.a_shape,
        "target": f"{SPEEDUP} times faster, lower error on every matrix",
        "met_by": met,
        "ranks": results,
    }
    script.publish("against_peers", published, chart, given.out)


if __name__ == "__main__":
    main()
