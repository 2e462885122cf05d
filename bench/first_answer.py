"""Seconds that a user waits for a first answer: a whole process, cold and warm.

Every row is a process of its own: cold with an empty folder of compiled programs, warm
with the folder that the cold one left.  Tracing, compiling and solving are read from
events of jax; programs that are compiled at the same time count each.  With
`--against FOLDER`, another checkout of kronjax, its processes run in turns with ours,
cold only.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import script, timing

ROOT = Path(__file__).resolve().parents[1]

PRELUDE = """
import time
begun = time.perf_counter()
import json, sys
import jax, numpy as np, kronjax
from kronjax import Configuration, approximate
getattr(kronjax, "cache", lambda: None)()
imported = time.perf_counter()
events = {}
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: events.update({name: events.get(name, 0.0) + seconds})
)
normal = np.random.default_rng(0).standard_normal
def weight(n):
    x = normal((n, 2 * n))
    return x @ x.T / n
"""

EPILOGUE = """
def total(*words):
    return sum(s for name, s in events.items() if any(word in name for word in words))
print(json.dumps({
    "import": imported - begun,
    "trace": total("jaxpr_trace", "jaxpr_to_mlir"),
    "compile": total("backend_compile"),
    "error": float(error),
}))
"""


@dataclass(frozen=True)
class Row:
    """A process to time.

    Attributes:
        name: Name of the row.
        code: Python that sets `error`, or arguments of the command line.
        cold: Limit on the seconds with an empty cache, or None.
        warm: Limit with a filled one, or None.
    """

    name: str
    code: str | tuple[str, ...]
    cold: float | None = None
    warm: float | None = None


def approximation(size, factors, rank, dtype, **keywords):
    """Return code that approximates a random square matrix."""
    shape = f"({size}, {size})"
    options = ", ".join(f"{name}={value}" for name, value in keywords.items())
    return (
        f"matrix = normal({shape}).astype('{dtype}')\n"
        f"found = approximate(matrix, Configuration({factors}, {rank}), {options})\n"
        "error = found.error.spectral"
    )


WEIGHTS = {"left_weight": "weight(144)", "right_weight": "weight(144)"}

SEARCH = (
    "found = kronjax.search(normal((36, 36)).astype('float32'), 216)\n"
    "error = found.trials[0].error"
)

ROWS = (
    Row("36x36, rank 3", approximation(36, (6, 6), 3, "float32"), 4, 1.5),
    Row("144x144, rank 2", approximation(144, (12, 12), 2, "float32")),
    Row(
        "144x144, rank 2, both weights, float64",
        approximation(144, (12, 12), 2, "float64", **WEIGHTS),
        6,
        3.5,
    ),
    Row("768x768, rank 32", approximation(768, (24, 32), 32, "float32")),
    Row(
        "36x36, rank 3, certified",
        approximation(36, (6, 6), 3, "float32", certify=True),
        6,
        2.5,
    ),
    Row("search, 36x36, 216 parameters", SEARCH, 15, 5),
    Row(
        "kronjax approximate, 36x36",
        ("approximate", "matrix.npy", "--a-shape", "6", "6", "--rank", "3"),
    ),
    Row(
        "kronjax compress, bundled model at 0.8",
        ("compress", "model", "--budget", "0.8", "--calibrate", "text.txt"),
    ),
    Row("kronjax demo", ("demo",), 45, 25),
)

QUICK = (
    Row("8x8", approximation(8, (2, 2), 1, "float32", num_starts=1), cold=10, warm=10),
)


def run(row, root, cache):
    """Time a process of a checkout; return its seconds and, for Python, its parts."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"PYTHONPATH": str(root), "KRONJAX_CACHE": str(cache)}
    program: tuple[str, ...] = ("-c", f"{PRELUDE}{row.code}{EPILOGUE}")
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(row.code, str):
            program = "-m", "kronjax", *row.code, *_outputs(row.code)
            _inputs(row.code, Path(folder))
        printed, seconds = timing.run_process(program, environment, folder)
    parts = json.loads(printed) if isinstance(row.code, str) else {}
    return {"seconds": seconds, **parts}


def _inputs(arguments, folder):
    """Write the files that a command reads."""
    import numpy as np

    from kronjax import demo, lm
    from kronjax.demo import corpus

    if "matrix.npy" in arguments:
        matrix = np.random.default_rng(0).standard_normal((36, 36))
        np.save(folder / "matrix.npy", matrix.astype(np.float32))
    if "model" in arguments:
        lm.save(demo.model(), folder / "model")
        text = "\n".join(corpus.documents())[:60_000]
        (folder / "text.txt").write_text(text, encoding="utf-8")


def _outputs(arguments):
    return ("--out", "out") if "demo" in arguments or "model" in arguments else ()


def measure(rows, against):
    """Return the times of all rows."""
    result = []
    for row in rows:
        script.say(row.name)
        with tempfile.TemporaryDirectory() as cache:
            place = Path(cache) / "programs"
            times = {"name": row.name, "cold": run(row, ROOT, place)}
            times["warm"] = run(row, ROOT, place)
        if against is not None:
            times["against"] = run(row, against, "off")
        result.append(times)
    return result


def draw(results):
    """Draw the seconds of every row, cold and warm, and those of the other checkout."""
    chart, axes = script.figure(8, 1 + 0.6 * len(results))
    kinds = {"against": "tab:gray", "cold": "tab:blue", "warm": "tab:cyan"}
    height = 0.8 / len(kinds)
    for i, (kind, color) in enumerate(kinds.items()):
        given = [j for j, row in enumerate(results) if kind in row]
        places = [j + i * height for j in given]
        seconds = [results[j][kind]["seconds"] for j in given]
        axes[0][0].barh(places, seconds, height, color=color, label=kind)
    axes[0][0].set_yticks(range(len(results)), [row["name"] for row in results])
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlabel("seconds of the whole process")
    axes[0][0].legend(frameon=False)
    return chart


def main():
    """Run the benchmark, and write `first_answer.json` and `first_answer.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of kronjax")
    parser.add_argument("--rows", help="only rows whose names contain this")
    given = parser.parse_args()
    rows = QUICK if given.quick else ROWS
    rows = [row for row in rows if (given.rows or "") in row.name]
    results = measure(rows, given.against and given.against.resolve())
    kinds = [kind for kind in ("against", "cold", "warm") if kind in results[0]]
    parts = ("import", "trace", "compile")
    script.table(
        "Seconds of whole processes, and the parts of a cold one",
        ("", *kinds, *parts),
        [
            [
                row["name"],
                *(f"{row[kind]['seconds']:.2f}" for kind in kinds),
                *(f"{row['cold'][x]:.2f}" if x in row["cold"] else "" for x in parts),
            ]
            for row in results
        ],
    )
    targets = [
        script.Target(f"{row.name}, {kind}", times[kind]["seconds"], limit)
        for row, times in zip(rows, results, strict=True)
        for kind, limit in (("cold", row.cold), ("warm", row.warm))
        if limit is not None
    ]
    script.print_targets(targets)
    found = {
        "quick": given.quick,
        "targets": [target.plain() for target in targets],
        "rows": results,
    }
    script.publish("first_answer", found, draw(results), given.out)


if __name__ == "__main__":
    main()
