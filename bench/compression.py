"""Losses of a language model at 0.8 and 0.9 of the parameters of its linear layers.

Losses are nats per token above the dense model, on eight windows spread over a text
that calibration has not seen. Calibration reads books, or the first half of the text
itself; the windows are then those of the second half. The parts are:

- planned budgets, the same method spread uniformly, and plans with block refinement;
- the MLP's last layer in all blocks but the first at half its parameters, with the same
  weights: weighted SVD, and a mixture fitted jointly;
- predicted and measured losses of single layers.

`--work FOLDER` stores moments, fits and every finished part; run the same command again
to resume.
"""

import dataclasses
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from bench import script
from kronjax import lm
from kronjax.io.cache import Cache
from kronjax.lm.compression import mixture, pipeline, plan
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression.candidates import Candidate
from kronjax.lm.compression.moments import load_moments, measure_moments, save_moments
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models.base import tokenizer_of
from kronjax.recipe import Recipe, Rule, Term

FRACTIONS = (0.8, 0.9)
SIZES = (0.2, 0.4, 0.6)
"""Fractions for the single layers."""

LIMITS = {
    "books 0.8": 0.75,
    "books 0.9": 0.30,
    "books 0.8 refined": 0.55,
    "books 0.9 refined": 0.22,
    "domain 0.8": 0.30,
    "domain 0.9": 0.09,
}
SECONDS, BYTES = 45 * 60, 8 * 2**30


@dataclasses.dataclass
class Experiment:
    """A model, its texts, and the amount of work.

    Attributes:
        model: The dense model.
        books: Tokens to calibrate on.
        text: Tokens to test on; its first half calibrates the part "domain".
        work: Folder in which everything is stored.
        window: Number of tokens in a window.
        windows: Number of windows that are scored.
        few: Number of windows that are scored for every single layer.
        tokens: Number of tokens that calibration reads.
        refine: Steps of refinement for every block.
    """

    model: Any
    books: np.ndarray
    text: np.ndarray
    work: Path
    window: int = 1024
    windows: int = 8
    few: int = 4
    tokens: int = 32_768
    refine: int = 60

    def __post_init__(self):
        self.halves = np.array_split(self.text, 2)
        self._dense: dict[tuple[str, int], float] = {}

    def calibration(self, name):
        """Return tokens to calibrate on, spread over the text of that name."""
        source = self.books if name == "books" else self.halves[0]
        return spread(source, self.window, self.tokens // self.window)

    def loss(self, model, name, windows):
        """Return nats per token on the windows that belong to a calibration."""
        source = self.text if name == "books" else self.halves[1]
        text = spread(source, self.window, windows)[:-1]
        rows = text.reshape(-1, self.window)
        return float(np.mean([nll(model, row) for row in rows]))

    def added(self, model, name, windows=None):
        """Return nats per token above the dense model, on all windows or on so many."""
        windows = windows or self.windows
        if (name, windows) not in self._dense:
            self._dense[name, windows] = self.loss(self.model, name, windows)
        return self.loss(model, name, windows) - self._dense[name, windows]

    def moments(self, name):
        """Measure moments, or read those that are stored."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            begun = time.perf_counter()
            measured = measure_moments(
                self.model, self.calibration(name), gradients=True, progress=False
            )
            save_moments(measured, path)
            self._clock(name).write_text(str(time.perf_counter() - begun))
        return load_moments(path)

    def calibration_seconds(self, name):
        """Return the seconds that the moments took to measure."""
        return float(self._clock(name).read_text())

    def folder(self, part):
        """Return the folder for the fits of a part: a folder holds one plan."""
        return self.work / "fits" / part

    def compress(self, recipe, calibration, part):
        """Compress the model by moments of a calibration; the fits resume."""
        return pipeline.run(
            self.model,
            recipe,
            self.moments(calibration),
            work=self.folder(part),
            progress=False,
        )

    def _clock(self, name):
        return self.work / f"{name}.seconds"


def spread(tokens, window, count):
    """Return windows spread evenly over tokens `[n]`, and a last token."""
    starts = np.linspace(0, len(tokens) - window - 1, count).astype(int)
    parts = [tokens[start : start + window] for start in starts]
    return np.concatenate([*parts, tokens[-1:]]).astype(np.int32)


def nll(model, tokens):
    """Return nats per token of a window; its first token is not scored."""
    return perplexity.perplexity(model, tokens, "krony-pt", progress=False).nll


def known(values: Iterable[float | None]) -> list[float]:
    """Leave out the values of layers whose fit has failed."""
    return [value for value in values if value is not None]


def kind_of(choice: Candidate) -> str:
    """Return the method of a choice, or "mixture" for sums of two configurations."""
    return "mixture" if len(choice.configurations) > 1 else choice.method.name


def planned(experiment: Experiment, name: str, fraction: float, refine: int = 0):
    """Compress for a budget as users do; report seconds by stage, and memory."""
    part = f"{name} {fraction}"
    done = experiment.compress(fraction, name, part)
    if refine:
        refinement.refine(
            done.model,
            experiment.model,
            experiment.calibration(name),
            steps=refine,
            work=Cache(experiment.folder(part)),
            progress=False,
        )
    seconds = {**done.seconds, "calibrate": experiment.calibration_seconds(name)}
    seconds["all"] = sum(seconds.values())
    kinds = [kind_of(choice) for choice in done.plan.choices] if done.plan else []
    return {
        "calibration": name,
        "fraction": fraction,
        "refine": refine,
        "added": experiment.added(done.model, name),
        "predicted": sum(known(layer.damage for layer in done.layers)),
        "failed": len(done.failed),
        "parameters": done.after.parameters,
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def interpolative(match: str, fraction: float) -> Rule:
    """Return the rule for the method interpolative, weighted by all moments."""
    weighting = "input+gradient"
    return Rule(
        match=match, method="interpolative", fraction=fraction, weighting=weighting
    )


def uniform(experiment: Experiment, fraction: float):
    """Compress all layers by the method interpolative at the same fraction."""
    rules = Recipe(rules=(interpolative("*", fraction),))
    done = experiment.compress(rules, "books", f"uniform {fraction}")
    return {
        "fraction": fraction,
        "added": experiment.added(done.model, "books"),
        "predicted": sum(known(layer.damage for layer in done.layers)),
        "failed": len(done.failed),
        "parameters": done.after.parameters,
    }


def mixtures(experiment: Experiment, weighting: Any):
    """Halve the parameters of the last MLP layers, by SVD and by mixtures."""
    layers = plan.compressible(experiment.model)
    names = [n for n in layers if n.endswith("mlp.down_proj")][1:]
    shape = layers[names[0]].kernel[...].shape
    svd = int(math.prod(shape) / 2 / sum(shape))
    rows = {}
    for way, ranks in {
        "svd": (svd, 0),
        "mixture": mixture.mix(shape, 0.5, 0.5),
    }.items():
        terms = tuple(
            Term(a_shape=c.a_shape, rank=c.rank)
            for c in mixture.configurations(shape, ranks)
        )
        held = {"norm": "frobenius", "weighting": weighting, "terms": terms}
        rules = [Rule(match=name, method="kronecker", **held) for name in names]
        done = experiment.compress(
            Recipe(rules=(*rules, Rule(match="*", method="keep"))),
            "books",
            f"mixtures {weighting}, {way}",
        )
        relative = known(layer.relative for layer in done.layers)
        rows[way] = {
            "added": experiment.added(done.model, "books"),
            "relative": float(np.mean(relative)),
            "failed": len(done.failed),
            "parameters": done.after.parameters,
        }
    return {"weighting": weighting, **rows}


def points(experiment: Experiment, calibration: str):
    """Return predicted and measured losses, one layer at a time."""
    layers = plan.compressible(experiment.model)
    blocks = sorted({name.split(".")[1] for name in layers}, key=int)
    chosen = [blocks[int(x)] for x in np.linspace(0, len(blocks) - 1, 5)[1:-1]]
    rows = []
    for i, name in enumerate(n for n in layers if n.split(".")[1] in chosen):
        fraction = SIZES[(i + i // len(SIZES)) % len(SIZES)]
        rules = interpolative(name, fraction), Rule(match="*", method="keep")
        part = f"points {calibration}, {name}"
        done = experiment.compress(Recipe(rules=rules), calibration, part)
        if done.failed:
            script.say(f"{name}: the fit has failed")
            continue
        rows.append(
            {
                "layer": name,
                "fraction": fraction,
                "predicted": done.layers[0].damage,
                "measured": experiment.added(done.model, calibration, experiment.few),
            }
        )
    return rows


def parts_of(experiment: Experiment) -> dict[str, Callable[[], Any]]:
    """Return the functions that measure the parts, by name."""
    parts: dict[str, Callable[[], Any]] = {}
    for name in ("books", "domain"):
        for fraction in FRACTIONS:
            parts[f"{name} {fraction}"] = lambda n=name, f=fraction: planned(
                experiment, n, f
            )
    parts["uniform 0.8"] = lambda: uniform(experiment, 0.8)
    for name in ("books", "domain"):
        parts[f"points {name}"] = lambda n=name: points(experiment, n)
    for weighting in ("input", "input+gradient"):
        parts[f"mixtures {weighting}"] = lambda w=weighting: mixtures(experiment, w)
    for fraction in FRACTIONS:
        parts[f"books {fraction} refined"] = lambda f=fraction: planned(
            experiment, "books", f, experiment.refine
        )
    return parts


def run(experiment: Experiment, wanted: list[str]) -> dict[str, Any]:
    """Measure the parts that are not stored yet; all of them, or those named."""
    kept = experiment.work / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name, part in parts_of(experiment).items():
        if name not in results and (not wanted or name in wanted):
            script.say(name)
            results[name] = part()
            kept.write_text(json.dumps(results))
    return results


def targets_of(results: Mapping[str, Any]) -> list[script.Target]:
    """Return the targets."""
    targets = [
        script.Target(f"added nats, {name}", results[name]["added"], limit)
        for name, limit in LIMITS.items()
        if name in results
    ]
    runs = [row for row in results.values() if "seconds" in row]
    if runs:
        # The slowest counts: a resumed run is faster.
        seconds = max(row["seconds"]["all"] for row in runs)
        peak = max(row["peak_bytes"] for row in runs)
        targets.append(script.Target("seconds in all", seconds, SECONDS))
        targets.append(script.Target("peak bytes", peak, BYTES))
    if {"books 0.8", "uniform 0.8"} <= set(results):
        ratio = results["books 0.8"]["added"] / results["uniform 0.8"]["added"]
        what = "planned over uniform, added nats"
        targets.append(script.Target(what, ratio, 0.5))
    if "mixtures input" in results:
        row = results["mixtures input"]
        ratio = row["mixture"]["added"] / row["svd"]["added"]
        targets.append(script.Target("mixtures over SVD, added nats", ratio, 0.8))
    for name in ("books", "domain"):
        rows = results.get(f"points {name}")
        if rows:
            what = f"rank correlation of predictions, {name}"
            targets.append(script.Target(what, correlation(rows), 0.9, True))
    return targets


def correlation(rows) -> float:
    """Return Spearman's rank correlation of predicted and measured losses."""
    result = spearmanr([r["predicted"] for r in rows], [r["measured"] for r in rows])
    return float(result[0])  # type: ignore[arg-type]


def draw(results):
    """Draw losses of the compressions, and measured against predicted losses."""
    chart, axes = script.figure(10, 4, columns=2)
    bars = {k: v["added"] for k, v in results.items() if "added" in v}
    for name, row in results.items():
        if name.startswith("mixtures"):
            for way in ("svd", "mixture"):
                label = name.replace("mixtures", "half of down_proj,")
                bars[f"{label}: {way}"] = row[way]["added"]
    places = np.arange(len(bars))
    axes[0, 0].barh(places, list(bars.values()), color=script.COLORS["kronjax"])
    axes[0, 0].set_yticks(places, list(bars))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlabel("nats per token above dense")
    for name in ("books", "domain"):
        rows = [r for r in results.get(f"points {name}", []) if r["measured"] > 0]
        if rows:
            predicted = [row["predicted"] for row in rows]
            measured = [row["measured"] for row in rows]
            axes[0, 1].loglog(predicted, measured, "o", label=f"calibrated: {name}")
            ends = [min(predicted), max(predicted)]
            axes[0, 1].loglog(ends, ends, ":", color="black")
            axes[0, 1].legend(frameon=False)
    axes[0, 1].set_xlabel("predicted nats of a layer")
    axes[0, 1].set_ylabel("measured")
    return chart


def quick(folder):
    """Return an experiment of seconds with random weights and random text."""
    from bench import gguf_files

    model = gguf_files.random_model()
    draws = np.random.default_rng(0)
    text = draws.integers(0, model.config.vocab_size, 2048).astype(np.int32)
    return Experiment(
        model, text, text[::-1], folder, 32, windows=2, few=1, tokens=640, refine=2
    )


def main():
    """Run the benchmark, and write `compression.json` and `compression.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--model", help="a model that kronjax.lm.load reads")
    parser.add_argument("--books", type=Path, nargs="+", help="texts to calibrate on")
    parser.add_argument(
        "--text", type=Path, help="text to test on; its first half calibrates, too"
    )
    parser.add_argument("--work", type=Path, help="folder for results; resumes")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    given = parser.parse_args()
    needed = given.model, given.books, given.text, given.work
    if not given.quick and None in needed:
        parser.error("--model, --books, --text and --work are needed, or --quick")
    with tempfile.TemporaryDirectory() as temporary:
        if given.quick:
            experiment = quick(Path(temporary))
        else:
            given.work.mkdir(parents=True, exist_ok=True)
            model = lm.load(given.model, dtype="float32")
            encode = tokenizer_of(model).encode
            books = [encode(p.read_text(errors="replace")) for p in given.books]
            text = encode(given.text.read_text(encoding="utf-8"))
            experiment = Experiment(
                model, np.concatenate(books), np.asarray(text), given.work
            )
        only = (
            ["books 0.8", "uniform 0.8", "points books"] if given.quick else given.only
        )
        results = run(experiment, only)
    targets = targets_of(results)
    script.print_targets(targets)
    chart = draw(results)
    facts = {"quick": given.quick, "targets": [target.plain() for target in targets]}
    script.publish("compression", {**facts, **results}, chart, given.out)


if __name__ == "__main__":
    main()
