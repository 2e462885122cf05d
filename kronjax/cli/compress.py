"""The commands that make models smaller: plan, compress, report.

What they need is imported inside them, so that `kronjax --help` loads no jax.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kronjax.cli.language import Dtype, Model
from kronjax.cli.options import Flag, Json, Seed, option
from kronjax.runs import cpu_threads

Weighting = Annotated[
    Literal["none", "input", "input+gradient"] | None,
    option("none|input|input+gradient"),
]

HELD_OUT = 60_000
"""Characters of the text after those that calibration reads, to measure on."""

WORK = ".kronjax-work"
"""The folder with what is finished, inside the one that is being made."""


def plan(
    model: Model,
    *,
    budget: Annotated[str | None, option("B")] = None,
    recipe: Annotated[str | None, option("NAME|FILE")] = None,
    calibrate: Annotated[str | None, option("FILE")] = None,
    tokens: Annotated[int, option("N")] = 32_768,
    weighting: Weighting = None,
    out: Annotated[Path | None, option("FILE.yaml")] = None,
    as_json: Json = False,
) -> int:
    """Say what every layer of a model would get, and why; nothing is changed.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub. For a recipe the
            config.json of the model is enough.
        budget: 0.8 of the linear layers, or 81M parameters, 160MB, 170MFLOP in all.
        recipe: Rules instead of a budget: the name of a recipe or a .yaml file.
        calibrate: A text to weight errors by.
        tokens: Of the text to read.
        weighting: What to weight by; all that the text allows by default.
        out: Write the plan as a recipe.
        as_json: Print one JSON object instead of the table.
    """
    from kronjax import recipe as recipes
    from kronjax.io import atomic
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.compression import pipeline, tables
    from kronjax.lm.compression import plan as planning
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.models import sizes
    from kronjax.lm.models.reading import tokens_of

    _one_of(budget, recipe)
    if recipe is not None and (calibrate or weighting):
        raise ValueError("a recipe says itself how layers are weighted")
    if out is not None:
        atomic.check_output(out, ".yaml")
    made = None
    if recipe is not None:
        rules = recipes.load(recipe)
        dense = hugging_face.outline(model)
    else:
        assert budget is not None
        dense = hugging_face.load(model)
        moments = None
        if calibrate is not None:
            text = _read(calibrate)
            read = tokens_of(dense, text)[: tokens + 1]
            gradients = weighting in (None, "input+gradient")
            moments = measure_moments(
                pipeline.precise(dense), read, gradients=gradients
            )
        made = planning.make(dense, budget, moments, weighting=weighting)
        rules = made.recipe()
    smaller = planning.outline(dense, rules)
    before, after = sizes.count(dense), sizes.count(smaller)
    if out is not None:
        atomic.write(out, recipes.dumps(rules).encode())
    if as_json:
        print(json.dumps(tables.planned(before, after, made), allow_nan=False))
        return 0
    _show(tables.plan(before, after, made), tables.totals(before, after))
    return 0


def compress(
    model: Model,
    *,
    out: Annotated[str, option("FOLDER")],
    budget: Annotated[str | None, option("B")] = None,
    recipe: Annotated[str | None, option("NAME|FILE")] = None,
    calibrate: Annotated[str | None, option("FILE")] = None,
    tokens: Annotated[int, option("N")] = 32_768,
    weighting: Weighting = None,
    refine: Annotated[int, option("STEPS")] = 0,
    sequential: Flag = False,
    evaluate: Annotated[str | None, option("FILE")] = None,
    protocol: Annotated[str, option("NAME")] = "krony-pt",
    dtype: Dtype | None = None,
    tolerance: Annotated[float, option("X")] = 1e-2,
    starts: Annotated[int, option("N")] = 1,
    seed: Seed = 0,
    dry_run: Flag = False,
    distributed: Flag = False,
    coordinator: Annotated[str | None, option("HOST:PORT")] = None,
    processes: Annotated[int | None, option("N")] = None,
    process: Annotated[int | None, option("I")] = None,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Make a smaller model, and a report with the reason for every choice.

    The same line goes on where an interrupted one stopped. A recipe without weights is
    for any safetensors file or folder: what is no language model ends as factors.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub; for a recipe without
            weights a .safetensors file or a folder of them, too.
        out: The folder to write: the model, report.json and report.html; by a recipe
            without weights the factors of every matrix, which may go to a URL.
        budget: 0.8 of the linear layers, or 81M parameters, 160MB, 170MFLOP in all.
        recipe: Rules instead of a budget: the name of a recipe or a .yaml file.
        calibrate: A text to weight errors by; what it holds beyond the tokens read is
            what perplexities are measured on, if no other text is given.
        tokens: Of the text to read.
        weighting: What to weight by; all that the text allows by default.
        refine: Train the factors of every block for so many steps to reproduce the
            dense block on the text, for example 100.
        sequential: Weight every block by what the compressed ones before it hand on.
        evaluate: A text to measure perplexities on.
        protocol: krony-pt, gptq-2048 or hf-strided.
        dtype: Precision of what is written; by default that of the model. Everything is
            computed in float32.
        tolerance: Gap that is good enough, for recipes without weights, as are all
            that follow.
        starts: Number of starts; the best is taken to the end.
        seed: Of the perturbed starts.
        dry_run: Print matrices, memory and time, and stop.
        distributed: Share the work with the same line on other hosts: on Cloud TPU,
            under Slurm and Open MPI 4 they find each other.
        coordinator: Where process 0 is, elsewhere.
        processes: How many there are.
        process: Number of this one, from 0.
        force: Replace the model that is in FOLDER.
        as_json: Print the record as one JSON object.
    """
    if recipe is not None:
        cpu_threads.reserve()  # before jax is there
    from kronjax import recipe as recipes
    from kronjax.cli import matrices
    from kronjax.io import storage
    from kronjax.lm.compression.budget import Budget
    from kronjax.runs.plan import SolveSettings
    from kronjax.runs.processes import Hosts, meet

    _one_of(budget, recipe)
    if recipe is not None and weighting:
        raise ValueError("a recipe says itself how layers are weighted")
    rules = recipes.load(recipe) if recipe else None
    if rules is not None and not (calibrate or evaluate or refine or sequential):
        path = _matrices_of(model)
        if path is not None and matrices.is_meant(path, rules):
            settings = SolveSettings(tolerance, starts, seed)
            options = matrices.Options(settings, dtype, dry_run, force, as_json)
            group = Hosts(0, 1)
            if not dry_run:
                group = meet(distributed, coordinator, processes, process)
            return matrices.compress(path, rules, out, options, group)
    if dry_run or distributed:
        raise ValueError(
            "--dry-run and --distributed are for recipes without weights, which need "
            "no text"
        )
    return _calibrated(
        model,
        rules or Budget.parse(budget or ""),
        storage.expanded(out),
        calibrate=calibrate,
        tokens=tokens,
        weighting=weighting,
        refine=refine,
        sequential=sequential,
        evaluate=evaluate,
        protocol=protocol,
        dtype=dtype,
        force=force,
        as_json=as_json,
    )


def _calibrated(
    model: str,
    asked: Any,
    out: Path,
    *,
    calibrate: str | None,
    tokens: int,
    weighting: Any,
    refine: int,
    sequential: bool,
    evaluate: str | None,
    protocol: str,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> int:
    """Compress a language model, weighted by what a text shows."""
    from kronjax.io.cache import Work
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.compression import html, pipeline, record
    from kronjax.lm.compression import plan as planning
    from kronjax.lm.compression.moments import memory
    from kronjax.lm.evaluation import protocols

    protocols.find(protocol)
    if (out / "config.json").exists() and not force:
        raise ValueError(f"{out} already holds a model; --force replaces it")
    given = None if calibrate is None else _read(calibrate)
    measured = None if evaluate is None else _read(evaluate)
    dense = hugging_face.load(model, dtype=dtype)
    planning.compressible(dense)
    if given is not None:
        taken = memory(dense, gradients=weighting != "input")
        print(
            f"Moments of inputs and gradients take up to {taken / 2**20:,.0f} MiB.",
            file=sys.stderr,
        )
    work = out / WORK
    result = pipeline.run(
        dense,
        asked,
        given,
        weighting=weighting,
        tokens=tokens,
        refine=refine,
        sequential=sequential,
        work=work,
    )
    if measured is None and given is not None:
        from kronjax.lm.models.reading import rest

        measured = rest(dense, given, tokens, HELD_OUT)
    # All that takes time before anything is replaced.
    found = record.of(result, dense, source=model, text=measured, protocol=protocol)
    for old in (record.NAME, html.NAME):
        (out / old).unlink(missing_ok=True)
    hugging_face.save(result.model, out)
    record.write(found, out)
    html.write(found, out)
    Work(work).clear()
    if as_json:
        print(json.dumps(record.read(out), allow_nan=False))
        return 0
    _tell(found, out)
    return 0


def report(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    open_it: Annotated[bool, option(name="open")] = False,
    as_json: Json = False,
) -> int:
    """Show what came of a compression, and write its page once more.

    Args:
        folder: That kronjax compress wrote, or still writes.
        open_it: Open the page in a browser.
        as_json: Print the record as one JSON object.
    """
    from kronjax.cli import matrices
    from kronjax.io import storage
    from kronjax.lm.compression import html, record

    place = storage.find(folder)
    code = matrices.report(place, as_json)
    if code is not None:
        return code
    path = storage.expanded(folder)
    found = record.read(path)
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return 0
    _tell(found, path)
    path = html.write(found, path)
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print(f"No browser could be opened; the page is {path}.", file=sys.stderr)
    return 0


def _matrices_of(model: str) -> Path | None:
    """Return the file or folder that holds a model, or None if it is in no such."""
    from kronjax.io import storage
    from kronjax.lm.checkpoints import sources

    path = storage.expanded(model)
    if path.suffix == ".safetensors" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path
    path = sources.find(model)
    return path if path.is_dir() else None


def _one_of(budget: str | None, recipe: str | None) -> None:
    if (budget is None) == (recipe is None):
        raise ValueError("give either --budget or --recipe")


def _read(name: str) -> Any:
    from kronjax.lm.text import documents

    return documents.read_text(name)


def _tell(found: dict[str, Any], folder: Path) -> None:
    from kronjax.lm.compression import html, tables

    _show(tables.compressed(found), html.summary(found))
    print(f"{folder / html.NAME} shows every layer.")


def _show(table: Any, verdict: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(verdict, soft_wrap=True)
