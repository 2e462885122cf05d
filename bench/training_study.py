"""Methods × {no training, vanilla, distillation} at equal parameters and tokens.

All linear layers of the bundled model are reduced to half of their parameters: by low
rank, by one Kronecker term (n_in / 2, n_out) ⊗ (2, 1) from several starts, or by
pruning. They are then trained on the text that the dense model was trained on, for
equally many tokens, with the same settings. Losses are those of held-out text, by the
protocol `krony-pt`; `recovered` is the part of the loss (in log-perplexity) added by
compression that training removes. It may exceed one: the dense model itself is not
fully trained, and is trained further for comparison.

A few methods are also trained five times as long, for 2.5 % of the tokens that the
dense model saw.

Finished parts are stored in `--work`; run the same command again to resume. `--minutes`
ends a run in time.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench import script
from bench.training_methods import WAYS, Method, Study, methods_of, trained
from kronjax import demo
from kronjax.demo import corpus
from kronjax.lm.evaluation import spectra
from kronjax.lm.models import gpt2, sizes
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.models.reading import tokens_of
from kronjax.lm.text import documents as texts

SEEN = 4_096_000
"""Number of tokens that the bundled model was trained on: see its data sheet."""

CHARACTERS = 80_000
"""Characters of the held-out text to measure on: half of it."""

DENSE = "dense, trained on"

BASES = {
    "low rank, progressive": "low rank, data-aware",
    "Kronecker, layer by layer": "Kronecker, Van Loan",
}
"""The methods without stages whose losses those with stages recover."""

LONG = (
    "pruning, gradual",
    "Kronecker, pruning start",
    "low rank, data-aware",
    DENSE,
)
"""Methods that are also trained for `long_steps`, in this order."""

RECOVERED, NEAR = 0.8, 1.05
"""Targets: the part of the loss of compression that the best method recovers, and the
perplexity of pruning over that of the dense model."""


def parts_of(study: Study) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the functions that measure the parts, by name, in their order."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {}

    def measured(model: LanguageModel) -> dict[str, Any]:
        counted = sizes.count(model)
        linear = sum(x.parameters for x in counted.layers)
        compared = spectra.compare(study.model, model)
        ranks = np.mean([(x.stable_rank, x.rank) for x in compared.after], axis=0)
        return {
            "loss": study.loss(model),
            "linear_parameters": linear,
            "log10_bound": compared.log10_bound,
            "log10_product": compared.log10_product,
            "stable_rank": ranks[0],
            "rank": ranks[1],
        }

    def timed(method: Method, way: str, seed: int, steps: int) -> dict[str, Any]:
        begun = time.perf_counter()
        model = trained(study, method, way, seed, steps)
        seconds = time.perf_counter() - begun
        return {**measured(model), "steps": steps, "seconds": seconds}

    parts["dense"] = lambda: measured(study.model)
    methods = methods_of(study)
    if study.only:
        methods = [method for method in methods if method.name in study.only]
    for method in methods:
        if method.name not in BASES:
            parts[f"{method.name}|none|0"] = lambda m=method: measured(m.start())
    # The dense model would learn nothing by distillation from itself.
    whole = Method(DENSE, lambda: nnx.clone(study.model), ways=("vanilla",))
    methods = [whole, *methods]
    named = {method.name: method for method in methods}

    def train_all(seed: int, extras: bool = False) -> None:
        for method in methods:
            for way in method.ways if method.is_extra == extras else ():
                parts[f"{method.name}|{way}|{seed}"] = lambda m=method, w=way: timed(
                    m, w, seed, study.steps
                )

    def train_long(names: Sequence[str]) -> None:
        for name in names:
            method, way = named[name], named[name].ways[-1]
            parts[f"{name}|{way}, long|0"] = lambda m=method, w=way: timed(
                m, w, 0, study.long_steps
            )

    # The most important parts come first, as time may end a run.
    first, *others = study.seeds
    train_all(first)
    train_long(study.long[:1])
    for seed in others:
        train_all(seed)
    train_long(study.long[1:])
    train_all(first, extras=True)
    return parts


def run(study: Study, minutes: float = math.inf) -> tuple[dict[str, Any], bool]:
    """Measure the parts that are not stored yet; return whether all are done."""
    kept = study.work / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    begun = time.perf_counter()
    for name, part in parts_of(study).items():
        if name in results:
            continue
        if time.perf_counter() - begun > 60 * minutes:
            return results, False
        results[name] = part()
        script.say(f"{name}: {results[name]['loss']:.4f}")
        new = kept.with_suffix(".new")
        new.write_text(json.dumps(results, indent=1))
        new.replace(kept)
    return results, True


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return mean, spread and recovered part by method and way."""
    dense = results["dense"]["loss"]
    losses_of: dict[tuple[str, str], list[float]] = {}
    for key, value in results.items():
        if key != "dense":
            name, way, _ = key.split("|")
            losses_of.setdefault((name, way), []).append(value["loss"])
    rows = []
    for (name, way), losses in losses_of.items():
        mean = float(np.mean(losses))
        row = {
            "method": name,
            "way": way,
            "seeds": len(losses),
            "loss": mean,
            "spread": max(losses) - min(losses),
            "perplexity": math.exp(mean),
        }
        start = results.get(f"{BASES.get(name, name)}|none|0")
        if way != "none" and start is not None:
            lost = start["loss"] - dense
            row["recovered"] = (start["loss"] - mean) / lost
        rows.append(row)
    return rows


def targets_of(results: dict[str, Any], rows: list[dict[str, Any]]):
    """Return the targets."""
    targets = []
    recovered = [x["recovered"] for x in rows if x.get("recovered") is not None]
    if recovered:
        what = "recovered of the loss, best method"
        targets.append(script.Target(what, max(recovered), RECOVERED, True))
    dense = math.exp(results["dense"]["loss"])
    pruned = [
        row["perplexity"] / dense
        for row in rows
        if row["method"].startswith("pruning") and "distillation" in row["way"]
    ]
    if pruned:
        what = "perplexity of pruning with distillation, over dense"
        targets.append(script.Target(what, min(pruned), NEAR))
    return targets


def draw(results: dict[str, Any], rows: list[dict[str, Any]]):
    """Draw nats above the dense model by method and way."""
    dense = results["dense"]["loss"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    ways = ["none", *WAYS, *(f"{way}, long" for way in WAYS)]
    chart, axes = script.figure(9, 0.55 * len(names) + 1.2)
    markers = dict(zip(ways, ("o", "s", "D", "^", "v"), strict=True))
    for way in ways:
        points = [row for row in rows if row["way"] == way]
        if points:
            axes[0, 0].errorbar(
                [max(row["loss"] - dense, -0.15) for row in points],
                [names.index(row["method"]) for row in points],
                xerr=[row["spread"] / 2 for row in points],
                fmt=markers[way],
                label="no training" if way == "none" else way,
            )
    axes[0, 0].axvline(0, color="black", linewidth=1)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xscale("symlog", linthresh=0.1)
    axes[0, 0].set_xlabel("nats per held-out token above the dense model")
    axes[0, 0].legend(frameon=False)
    return chart


def quick(work: Path) -> Study:
    """Return a study of seconds: a random model of one block, one seed, few steps."""
    bundled = demo.model()
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config: Any = dataclasses.replace(bundled.config, **small)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    model.tokenizer = bundled.tokenizer
    tokens = tokens_of(model, demo.held_out()[:9_000])
    held_out = texts.from_rows([demo.held_out()[-3_000:]], source="quick")
    given: Any = {"steps": 4, "long_steps": 5, "batch": 1, "length": 32}
    few: Any = {
        "only": ("low rank, data-aware", *LONG[:1]),
        "long": LONG[:1],
    }
    return Study(
        model, tokens, held_out, work, **given, seeds=(0,), calibration=512, **few
    )


def full(work: Path) -> Study:
    """Return the whole study."""
    model = demo.model()
    path = work / "tokens.npy"
    if not path.exists():
        np.save(path, tokens_of(model, corpus.training()))
    held_out = texts.from_rows(
        [demo.held_out()[:CHARACTERS]], source="held-out documentation"
    )
    return Study(model, np.load(path), held_out, work, long=LONG)


def main():
    """Run the study, and write `training_study.json` and `training_study.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder of finished parts; resumes")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no part after these"
    )
    given = parser.parse_args()
    if not given.quick and given.work is None:
        parser.error("--work FOLDER is needed, or --quick")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if given.quick else given.work
        work.mkdir(parents=True, exist_ok=True)
        # Seeds and starts share their programs.
        jax.config.update("jax_compilation_cache_dir", str(work / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        study = quick(work) if given.quick else full(work)
        results, complete = run(study, given.minutes)
    rows = rows_of(results)
    columns = ("method", "way", "seeds", "loss", "spread", "perplexity", "recovered")
    cells = [[row.get(name, "") for name in columns] for row in rows]
    script.table("Held-out text", columns, cells)
    targets = targets_of(results, rows)
    script.print_targets(targets)
    facts = {
        "quick": given.quick,
        "complete": complete,
        "targets": [target.plain() for target in targets],
        "tokens": study.steps * study.batch * study.length,
        "long_tokens": study.long_steps * study.batch * study.length,
        "seen": SEEN,
        "rows": rows,
        "runs": results,
    }
    script.publish("training_study", facts, draw(results, rows), given.out)


if __name__ == "__main__":
    main()
