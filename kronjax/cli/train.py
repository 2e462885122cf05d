"""The command `train`.

Modules that load jax are imported inside, so that `kronjax --help` loads no jax.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from kronjax.cli.language import Dtype, Model
from kronjax.cli.options import Flag, Json, Sharing, fields_of, option
from kronjax.lm.training.settings import Course, Optimizer, Pruning, Settings, Weights

FINISHED = "finished.json"
"""File with the record of a finished training and the digest of its command."""

SETTINGS = fields_of(Settings, without=("optimizer", "weights", "evaluate_blocks"))
OPTIMIZER = fields_of(Optimizer, without=("final", "b1", "b2"))
WEIGHTS = fields_of(
    Weights,
    names={
        "next_token": "next-token-weight",
        "logits": "logits-weight",
        "hidden": "hidden-weight",
        "attention": "attention-weight",
        "layers": "layer-map",
    },
    metavars={"temperature": "T", "layers": "I:J,..."},
    kinds={"layers": str | None},
)
PRUNING = fields_of(
    Pruning,
    without=("match", "begin", "every"),
    names={"steps": "prune-steps"},
    metavars={"sparsity": "S", "pattern": "N:M"},
    kinds={"pattern": str | None},
)
COURSE = fields_of(Course, without=("pruning", "method"), metavars={"low_rank_to": "F"})


def train(
    model: Model,
    *,
    data: Annotated[str, option("FILE")],
    teacher: Annotated[str | None, option("MODEL")] = None,
    out: Annotated[Path | None, option("FOLDER")] = None,
    calibrate: Annotated[str | None, option("FILE")] = None,
    evaluate: Annotated[str | None, option("FILE")] = None,
    column: Annotated[str, option("NAME")] = "text",
    settings: Annotated[Any, SETTINGS],
    optimizer: Annotated[Any, OPTIMIZER],
    weights: Annotated[Any, WEIGHTS],
    pruning: Annotated[Any, PRUNING],
    course: Annotated[Any, COURSE],
    dtype: Dtype | None = None,
    sharing: Sharing,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Train a model with any kinds of layers, with or without a teacher.

    Run the same command again to resume an interrupted training. Losses, a figure and a
    table are written beside the weights.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        data: A .txt, .jsonl or .parquet file, or dataset:OWNER/NAME:SPLIT.
        teacher: A model with the same tokenizer to match, for example the dense one.
        out: The output folder; MODEL-trained by default.
        calibrate: A text whose moments weight the entries to prune and the errors of
            low rank.
        evaluate: Another text to evaluate on instead of a part of the data.
        column: The field with the text, where rows have several.
        settings: Options of the training.
        optimizer: Options of the optimiser.
        weights: Options of the loss.
        pruning: Options of pruning.
        course: Options of low rank.
        dtype: Precision of the written weights; by default that of the model.
        sharing: Options about other processes.
        force: Replace the model in FOLDER and discard an interrupted training.
        as_json: Print the record as one JSON object.
    """
    import jax

    from kronjax.io import atomic, storage
    from kronjax.io.json_values import jsonable
    from kronjax.lm.checkpoints import dtypes, hugging_face
    from kronjax.lm.training import shrinking
    from kronjax.lm.training import trainer as training
    from kronjax.runs.processes import meet

    chosen = Settings(
        **vars(settings),
        optimizer=Optimizer(**vars(optimizer)),
        weights=Weights(**{**vars(weights), "layers": _pairs(weights.layers)}),
    )
    plan = _course(pruning, course)
    if calibrate is not None and not plan.changes:
        raise ValueError(
            "--calibrate needs --sparsity, --pattern or --low-rank-to; give one of them"
        )
    folder = storage.expanded(out if out is not None else default_folder(model))
    state = folder / training.STATE
    if sharing.distributed and chosen.shard == "none":
        raise ValueError("--distributed needs --shard data or full")
    sources = [model, teacher, data, evaluate, calibrate]
    request = _request(sources, column, chosen, plan, dtype)
    finished = None if force else _finished(folder, request)
    if finished is not None:
        if as_json:
            print(json.dumps(finished, allow_nan=False))
        elif not sharing.process:
            _show(finished, folder)
            print("This command is finished already: nothing was computed.")
        return 0
    group = meet(**vars(sharing))
    if force and group.process == 0:
        shutil.rmtree(state, ignore_errors=True)

    def models():
        if (folder / "config.json").exists() and not force:
            raise ValueError(f"{folder} already holds a model; --force replaces it")
        return _models(model, teacher)

    def texts():
        if group.process > 0 and not state.exists():
            raise ValueError(
                f"process {group.process} does not see what is in {folder}"
            )
        return _texts(student, (data, evaluate), state, column)

    def moments():
        if calibrate is None:
            return None
        return _moments(student, calibrate, gradients=plan.low_rank_to is not None)

    student, master = group.together(models)
    tokens, tests = group.in_turn(texts)
    measured = group.together(moments)
    try:
        result = shrinking.run(
            student,
            tokens,
            chosen,
            plan,
            moments=measured,
            teacher=master,
            held_out=tests,
            folder=folder,
        )
    except training.Stopped as error:
        print(
            f"kronjax: {error}; run the same command again to resume", file=sys.stderr
        )
        return 128 + error.signal
    except Exception as error:
        group.leave(2)
        if group.processes > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"other processes are out of reach ({reason}): run the same command "
                "again to resume"
            ) from error
        raise

    def save():
        if group.process == 0:
            if dtype is None:
                trained = dtypes.restored(result.model, student)
            else:
                trained = hugging_face.cast(result.model, dtype)
            hugging_face.save(trained, folder)
            facts = jsonable({"request": request, "record": result.record})
            atomic.write(folder / FINISHED, json.dumps(facts, indent=1).encode())
            shutil.rmtree(state, ignore_errors=True)

    group.together(save)
    if group.process > 0:
        return 0
    if as_json:
        print(json.dumps(result.record, allow_nan=False))
        return 0
    _show(result.record, folder)
    return 0


def _request(sources: Iterable[str | None], *options: Any) -> str:
    """Return a digest of a command: its options, and the state of the files it reads.

    Args:
        sources: Paths of models and texts, or their names elsewhere.
        options: All other options, with an unambiguous `repr`.
    """
    from kronjax.io import storage
    from kronjax.io.cache import digest

    states = []
    for source in sources:
        path = None if source is None else storage.expanded(source)
        files = [] if path is None else [path, *sorted(path.glob("*"))]
        facts = [(x.name, x.stat()) for x in files if x.is_file()]
        states.append([(name, x.st_size, x.st_mtime_ns) for name, x in facts])
    return digest(list(sources), states, options)


def _finished(folder: Path, request: str) -> dict[str, Any] | None:
    """Return the record of a training in a folder if the same command has made it."""
    from kronjax.io.json_values import read_json

    path = folder / FINISHED
    if not path.is_file() or not (folder / "config.json").is_file():
        return None
    facts = read_json(path)
    return facts.get("record") if facts.get("request") == request else None


def default_folder(model: str) -> Path:
    """Return the default output folder for a model.

    >>> default_folder("openai-community/gpt2").name, default_folder("a.gguf").name
    ('gpt2-trained', 'a-trained')
    """
    path = Path(model)
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}-trained")
    return Path(f"{path.name.removesuffix('.gguf')}-trained")


def _models(model: str, teacher: str | None) -> tuple[Any, Any]:
    """Return a model and its teacher or None, after comparing their tokenizers."""
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.models.base import tokenizer_of
    from kronjax.lm.text import blocks

    student = hugging_face.load(model)
    if teacher is None:
        return student, None
    master = hugging_face.load(teacher)
    blocks.check_tokenizers(tokenizer_of(student), master.tokenizer)
    return student, master


def _texts(model: Any, names, folder: Path, column: str) -> list[Any]:
    """Return the tokens of each text; None for None."""
    from kronjax.lm.models.base import tokenizer_of
    from kronjax.lm.text import blocks

    tokenizer = tokenizer_of(model)
    return [
        None if name is None else blocks.prepare(name, tokenizer, folder, column=column)
        for name in names
    ]


def _course(pruning: Any, course: Any) -> Course:
    """Return the changes of the layers that the options ask for."""
    wanted = None
    if pruning.sparsity is not None or pruning.pattern is not None:
        pattern = pruning.pattern and _pattern(pruning.pattern)
        wanted = Pruning(**{**vars(pruning), "pattern": pattern, "match": course.match})
    elif pruning.scope != Pruning.scope or pruning.steps is not None:
        raise ValueError("--scope and --prune-steps are of pruning: give --sparsity S")
    if course.low_rank_to is None and wanted is None and course.match != Course.match:
        raise ValueError(
            "--match selects the layers that become smaller: give --sparsity, "
            "--pattern or --low-rank-to, too"
        )
    return Course(wanted, **vars(course))


def _pattern(text: str) -> tuple[int, int]:
    """Return the numbers of a pattern.

    >>> _pattern("2:4")
    (2, 4)
    """
    try:
        n, m = map(int, text.split(":"))
    except ValueError as error:
        raise ValueError(f"--pattern {text}; write it like 2:4") from error
    return n, m


def _moments(model: Any, name: str, *, gradients: bool) -> Any:
    """Return the moments of the inputs of layers, and of gradients, on a text."""
    from kronjax.lm.compression import options, pipeline
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.models.reading import tokens_of
    from kronjax.lm.text import documents as texts

    tokens = tokens_of(model, texts.read_text(name))[: options.TOKENS + 1]
    return measure_moments(pipeline.precise(model), tokens, gradients=gradients)


def _pairs(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """Return the pairs of blocks of a `--layer-map`."""
    if text is None:
        return None
    try:
        parts = [part.split(":") for part in text.split(",")]
        return tuple((int(i), int(j)) for i, j in parts)
    except ValueError as error:
        raise ValueError(f"--layer-map {text}; write it like 0:1,1:3") from error


def _show(record: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from kronjax.lm.training import history

    table = Table(show_header=False)
    for row in history.rows(record):
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{folder} holds the model, {history.METRICS}, {history.FIGURE} and "
        f"{history.SUMMARY}.",
        soft_wrap=True,
    )
