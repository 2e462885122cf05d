"""The commands that make models smaller: plan and compress.

What they need is imported inside them, so that `kronjax --help` loads no jax.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kronjax.cli.console import widen
from kronjax.cli.factorize import FAILURE, forecast, hosts_of, tell_overlaps
from kronjax.cli.language import Dtype, Model
from kronjax.cli.options import Flag, Json, Sharing, Solving, option

if TYPE_CHECKING:
    from kronjax.io.storage import Storage

Weighting = Annotated[
    Literal["none", "input", "input+gradient"] | None,
    option("none|input|input+gradient"),
]

HELD_OUT = 60_000
"""Characters of the text after the tokens of calibration, to measure perplexities."""

PROTOCOL = "krony-pt"
"""Protocol of perplexities by default."""

WORK = ".kronjax-work"
"""Folder of the unfinished work, inside the folder of the model."""

CONFIG = "config.json"
"""The file that says that a folder holds a model."""


def plan(
    model: Model,
    *,
    budget: Annotated[str | None, option("B")] = None,
    recipe: Annotated[str | None, option("NAME|FILE")] = None,
    calibrate: Annotated[str | None, option("FILE")] = None,
    tokens: Annotated[int | None, option("N")] = None,
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
        tokens: Number of tokens of the text to read; 32768 by default.
        weighting: What to weight by; all that the text allows by default.
        out: Write the plan as a recipe.
        as_json: Print one JSON object instead of the table.
    """
    from kronjax import recipe as recipes
    from kronjax.io import atomic
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.compression import pipeline, tables
    from kronjax.lm.compression import plan as planning
    from kronjax.lm.compression.budget import Budget
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.compression.options import TextOptions
    from kronjax.lm.models import sizes
    from kronjax.lm.models.reading import tokens_of

    _one_of(budget, recipe)
    if recipe is not None and (calibrate or weighting or tokens is not None):
        raise ValueError(
            "a recipe says itself how layers are weighted: leave out --calibrate, "
            "--tokens and --weighting"
        )
    if weighting == "none" and calibrate is not None:
        raise ValueError(
            "with --weighting none no text is read: leave out --calibrate, or "
            "--weighting"
        )
    rules = recipes.load(recipe) if recipe else Budget.parse(budget or "")
    options = TextOptions(weighting, tokens)
    options.check(rules, calibrate)
    if out is not None:
        atomic.check_output(out, ".yaml")
    made = None
    if isinstance(rules, recipes.Recipe):
        dense = hugging_face.outline(model)
    else:
        dense = hugging_face.load(model)
        moments, needed = None, options.needed(rules, (), calibrate)
        if needed != "none":
            read = tokens_of(dense, _read(calibrate))[: options.num_tokens + 1]
            gradients = needed == "input+gradient"
            moments = measure_moments(
                pipeline.precise(dense), read, gradients=gradients
            )
        made = planning.make(dense, rules, moments, weighting=weighting)
        rules = made.recipe()
    smaller = planning.outline(dense, rules)
    before, after = sizes.count(dense), sizes.count(smaller)
    kept = {x.name: reason for x, reason in planning.staying_dense(rules, dense)}
    if out is not None:
        atomic.write(out, recipes.dumps(rules).encode())
    if as_json:
        print(json.dumps(tables.planned(before, after, made, kept), allow_nan=False))
        return 0
    _show(tables.plan(before, after, made, kept), tables.totals(before, after))
    return 0


def compress(
    model: Model,
    *,
    out: Annotated[str, option("FOLDER")],
    budget: Annotated[str | None, option("B")] = None,
    recipe: Annotated[str | None, option("NAME|FILE")] = None,
    calibrate: Annotated[str | None, option("FILE")] = None,
    tokens: Annotated[int | None, option("N")] = None,
    weighting: Weighting = None,
    solving: Solving,
    refine: Annotated[int, option("STEPS")] = 0,
    sequential: Flag = False,
    evaluate: Annotated[str | None, option("FILE")] = None,
    protocol: Annotated[str | None, option("NAME")] = None,
    dtype: Dtype | None = None,
    dry_run: Flag = False,
    sharing: Sharing,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Compress a language model, and write a report with the reason for every choice.

    Run the same command again to resume after an interruption. For tensors that are no
    language model, see kronjax factorize.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        out: Folder, or URL, to write the model, report.json and report.html to.
        budget: 0.8 of the linear layers, or 81M parameters, 160MB, 170MFLOP in all.
        recipe: Rules instead of a budget: the name of a recipe or a .yaml file.
        calibrate: A text to weight errors by; perplexities are measured on the part
            after the tokens that are read, if no other text is given.
        tokens: Number of tokens of the text to read; 32768 by default.
        weighting: Moments to weight by; all that the text allows by default.
        solving: Options of the fits.
        refine: Train the factors of every block for so many steps to reproduce the
            dense block on the text, for example 100.
        sequential: Weight every block by the outputs of the compressed blocks before
            it.
        evaluate: A text to measure perplexities on; it changes no weight.
        protocol: Protocol of perplexities: krony-pt (default), gptq-2048 or
            hf-strided.
        dtype: Precision of the written model; by default that of the given model. All
            fits are computed in float32.
        dry_run: Print matrices, memory and time of the fits, and stop.
        sharing: Options about other processes.
        force: Replace the model, and the unfinished work, in FOLDER.
        as_json: Print the record as one JSON object.

    Returns:
        0, or 3 if a layer failed and stays dense.
    """
    from kronjax import recipe as recipes
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.compression import pipeline, record
    from kronjax.lm.compression import plan as planning
    from kronjax.lm.compression.budget import Budget
    from kronjax.lm.compression.options import TextOptions, refuse_starts_of_budgets
    from kronjax.runs.settings import SolveSettings

    _one_of(budget, recipe)
    settings = SolveSettings(**vars(solving))
    rules = recipes.load(recipe) if recipe else Budget.parse(budget or "")
    options = TextOptions(weighting, tokens, refine, sequential)
    options.check(rules, calibrate)
    refuse_starts_of_budgets(rules, settings)
    protocol = _protocol(protocol, is_measured=bool(calibrate or evaluate))
    if dry_run and sequential:
        raise ValueError("--dry-run cannot know the moments of --sequential")
    place = _place(out, model)
    held = None if force else _held(place, out, dry_run)
    given, measured = map(_read, (calibrate, evaluate))
    hosts = hosts_of(dry_run, sharing)
    dense = hosts.together(lambda: hugging_face.load(model, dtype=dtype))
    planning.compressible(dense)
    texts = given, measured
    request = record.request(dense, rules, texts, settings, options, protocol)
    if held is not None:
        return _finished(held, request, out, as_json)
    if hosts.process == 0:
        _tell_overlaps(dense, rules)
        _tell_memory(dense, given, rules, weighting)
    work = f"{out.rstrip('/')}/{WORK}"
    prepared = hosts.together(
        lambda: pipeline.prepare(
            dense,
            rules,
            given,
            settings=settings,
            work=None if dry_run else work,
            hosts=hosts,
            force=force,
            **dataclasses.asdict(options),
        )
    )
    if dry_run:
        forecast(*prepared.planned(), as_json)
        return 0
    result = prepared.run()
    if hosts.process > 0:
        return 0
    if measured is None and given is not None:
        measured = _rest(dense, given, options.num_tokens)
    facts = {"source": model, "text": measured, "protocol": protocol}
    written = _written(result, dense, place, request=request, **facts)
    _clear(place, work)
    if as_json:
        print(json.dumps(written, allow_nan=False))
    else:
        show_model(written, out)
    return FAILURE if result.failed else 0


def _protocol(name: str | None, *, is_measured: bool) -> str:
    """Return the name of the protocol, after checking that something is measured."""
    from kronjax.lm.evaluation import protocols

    if name is None:
        return PROTOCOL
    protocols.find(name)
    if not is_measured:
        raise ValueError(
            "--protocol says how perplexities are measured, and there is no text to "
            "measure them on: give --evaluate FILE, or leave --protocol out"
        )
    return name


def _place(out: str, model: str) -> "Storage":
    """Return the place for the model, after checking that it is not the source."""
    from kronjax.io import storage

    place = storage.find(out)
    if storage.is_source(place, model):
        raise ValueError(f"{out} holds the model: give --out another folder")
    return place


def _held(place: "Storage", out: str, dry_run: bool) -> dict[str, Any] | None:
    """Return the record of a finished model at a place, or None if there is none."""
    from kronjax.lm.compression import record

    if place.read(CONFIG) is None:
        return None
    found = {} if place.read(record.NAME) is None else record.load(place)
    if dry_run or not found.get("request"):
        raise ValueError(f"{out} already holds a model; --force replaces it")
    return found


def _finished(found: dict[str, Any], request: str, out: str, as_json: bool) -> int:
    """Print the record of a model that this command has made already."""
    if found["request"] != request:
        raise ValueError(
            f"{out} already holds a model that another command made; --force replaces "
            "it"
        )
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        show_model(found, out)
        print("This command is finished already: nothing was computed.")
    failed = any(x.get("status") == "failed" for x in found["layers"])
    return FAILURE if failed else 0


def _rest(dense, text, tokens: int) -> Any:
    """Return the part of a text after the tokens that are read, or None if short."""
    from kronjax.lm.models.reading import rest

    return rest(dense, text, tokens, HELD_OUT)


def _written(result, dense, place, **facts) -> dict[str, Any]:
    """Write the model and its reports to a place; return the record."""
    from kronjax.io.storage import LocalFolder
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.compression import html, record

    # Everything that takes time comes before anything is replaced.
    contents = record.of(result, dense, **facts)

    def write(folder: Path) -> None:
        hugging_face.save(result.model, folder)
        record.write(contents, folder)
        html.write(contents, folder)

    if isinstance(place, LocalFolder):
        write(place.path)
        return record.read(place.path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        # The file that says that there is a model comes last.
        files = [x for x in folder.rglob("*") if x.is_file()]
        for path in sorted(files, key=lambda path: path.name == CONFIG):
            place.write(path.relative_to(folder).as_posix(), path.read_bytes())
        return record.read(folder)


def _clear(place, work: str) -> None:
    """Remove the folder of the work."""
    from kronjax.io.storage import LocalFolder
    from kronjax.lm.compression import fits
    from kronjax.runs.store import Store, read_plan

    if isinstance(place, LocalFolder):
        shutil.rmtree(place.path / WORK, ignore_errors=True)
        return
    for store in fits.stores(work):
        plan = read_plan(store)
        if plan is not None:
            Store(store, plan).clear()


def _tell_overlaps(dense, rules) -> None:
    """Print which rules match layers that other rules decide."""
    from kronjax import nn
    from kronjax.lm.compression import plan
    from kronjax.recipe import Recipe

    if isinstance(rules, Recipe):
        tell_overlaps(rules, plan.compressible(dense), nn.tables(dense))


def _tell_memory(dense, text, rules, weighting) -> None:
    """Print the memory that moments take, if there is a text for them."""
    from kronjax.lm.compression.moments import memory
    from kronjax.recipe import Recipe

    needed = {weighting or "input+gradient"}
    if isinstance(rules, Recipe):
        needed = {rule.weighting for rule in rules.rules}
    if text is None or needed <= {"none"}:
        return
    taken = memory(dense, gradients="input+gradient" in needed)
    print(
        f"Moments of inputs and gradients take up to {taken / 2**20:,.0f} MiB.",
        file=sys.stderr,
    )


def show_model(record: dict[str, Any], folder: str) -> None:
    """Print the layers and the sizes of a compressed model, from its record."""
    from kronjax.io.atomic import printable
    from kronjax.lm.compression import html, tables

    _show(tables.compressed(record), html.summary(record))
    dense = [x for x in record["layers"] if x.get("status") in ("failed", "dense")]
    for layer in dense:
        print(f"{printable(layer['name'])} {layer['reason']}.")
    print(f"{folder.rstrip('/')}/{html.NAME} shows every layer.")


def _one_of(budget: str | None, recipe: str | None) -> None:
    if (budget is None) == (recipe is None):
        raise ValueError("give either --budget or --recipe")


def _read(name: str | None) -> Any:
    from kronjax.lm.text import documents

    return None if name is None else documents.read_text(name)


def _show(table: Any, verdict: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    widen(console, table)
    console.print(table)
    console.print(verdict, soft_wrap=True)
