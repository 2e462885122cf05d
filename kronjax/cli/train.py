"""The command that trains models: train.

What it needs is imported inside, so that `kronjax --help` loads no jax.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from kronjax.cli.language import Dtype, Model
from kronjax.cli.options import Flag, Json, Seed, option


def train(
    model: Model,
    *,
    data: Annotated[str, option("FILE")],
    teacher: Annotated[str | None, option("MODEL")] = None,
    out: Annotated[Path | None, option("FOLDER")] = None,
    steps: Annotated[int | None, option("N")] = None,
    batch: Annotated[int, option("N")] = 8,
    accumulate: Annotated[int, option("N")] = 1,
    length: Annotated[int | None, option("N")] = None,
    rate: Annotated[float, option("X")] = 3e-4,
    warmup: Annotated[int | None, option("N")] = None,
    decay: Annotated[float, option("X")] = 0.1,
    clip: Annotated[float, option("X")] = 1.0,
    next_token_weight: Annotated[float, option("X")] = 1.0,
    logits_weight: Annotated[float, option("X")] = 1.0,
    hidden_weight: Annotated[float, option("X")] = 0.0,
    attention_weight: Annotated[float, option("X")] = 0.0,
    temperature: Annotated[float, option("T")] = 1.0,
    layer_map: Annotated[str | None, option("I:J,...")] = None,
    sparsity: Annotated[float | None, option("S")] = None,
    pattern: Annotated[str | None, option("N:M")] = None,
    scope: Annotated[
        Literal["layer", "global", "output"], option("layer|global|output")
    ] = "layer",
    prune_steps: Annotated[int | None, option("N")] = None,
    low_rank_to: Annotated[float | None, option("F")] = None,
    stages: Annotated[int, option("N")] = 4,
    match: Annotated[tuple[str, ...], option("NAME ...")] = ("*",),
    calibrate: Annotated[str | None, option("FILE")] = None,
    freeze: Annotated[tuple[str, ...], option("NAME ...")] = (),
    precision: Annotated[
        Literal["float32", "bfloat16"], option("float32|bfloat16")
    ] = "float32",
    remat: Flag = False,
    shard: Annotated[Literal["none", "data", "full"], option("none|data|full")] = (
        "none"
    ),
    held_out: Annotated[float, option("X")] = 0.05,
    evaluate: Annotated[str | None, option("FILE")] = None,
    evaluate_every: Annotated[int | None, option("N")] = None,
    patience: Annotated[int | None, option("N")] = None,
    checkpoint_every: Annotated[int, option("N")] = 500,
    keep: Annotated[int, option("N")] = 2,
    column: Annotated[str, option("NAME")] = "text",
    seed: Seed = 0,
    dtype: Dtype | None = None,
    distributed: Flag = False,
    coordinator: Annotated[str | None, option("HOST:PORT")] = None,
    processes: Annotated[int | None, option("N")] = None,
    process: Annotated[int | None, option("I")] = None,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Train a model, of whatever layers it is made, or have it follow a teacher.

    The same line goes on where an interrupted one stopped. Losses, a figure and a table
    are written beside the weights.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        data: A .txt, .jsonl or .parquet file, or dataset:OWNER/NAME:SPLIT.
        teacher: A model to follow, of the same tokens: the dense one for example.
        out: The folder to write; MODEL-trained by default.
        steps: Number of updates; by default one pass over the data.
        batch: Windows in each.
        accumulate: Parts in which a batch is taken, to save memory.
        length: Tokens of a window; by default the context of the model, at most 1024.
        rate: The largest learning rate; a cosine leads to a tenth of it.
        warmup: Steps in which it rises; by default a tenth of all, at most 200.
        decay: Of the weights in matrices and factors.
        clip: The largest norm of the gradient; 0 does not clip.
        next_token_weight: Weight of the next-token loss.
        logits_weight: Weight of the divergence from what the teacher predicts.
        hidden_weight: Weight of the distance of hidden states from the teacher's.
        attention_weight: Weight of the divergence from the teacher's attention.
        temperature: Softens predictions before they are compared.
        layer_map: Which block of the model follows which of the teacher, such as
            0:1,1:3; spread evenly by default.
        sparsity: Prune so much of the linear layers gradually, then train on what is
            left: 0.5 is half.
        pattern: Prune to N of every M consecutive inputs instead, such as 2:4.
        scope: What competes to be kept: the entries of a layer, of all layers, or of
            the weights of each output.
        prune_steps: In which sparsity rises; by default six tenths of all.
        low_rank_to: Lower ranks in stages until so much of the parameters is left.
        stages: How many, with as many steps each.
        match: Names of layers that become smaller, as in recipes; all by default.
        calibrate: A text to weigh entries and errors by.
        freeze: Names of what is not trained, such as wte or h.*.attn.*.
        precision: Of products; parameters are float32 while they are trained.
        remat: Compute blocks twice, to save memory.
        shard: Deal batches out to all devices, with parameters copied (data) or cut
            in parts (full).
        held_out: Part of the data, at its end, that is evaluated on.
        evaluate: Another text to evaluate on instead.
        evaluate_every: Steps between two evaluations; by default a tenth of all.
        patience: Stop after so many evaluations without a lower loss.
        checkpoint_every: Steps between two checkpoints.
        keep: How many checkpoints to keep.
        column: The field with the text, where rows have several.
        seed: Seed of the order of the data.
        dtype: Precision of what is written; by default that of the model.
        distributed: Train with the same line on other hosts, which see the same FOLDER:
            on Cloud TPU, under Slurm and Open MPI 4 they find each other.
        coordinator: Where process 0 is, elsewhere.
        processes: How many there are.
        process: Number of this one, from 0.
        force: Replace the model that is in FOLDER, and forget an interrupted training.
        as_json: Print the record as one JSON object.
    """
    import jax

    from kronjax.io import storage
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.models.base import parameter_dtype
    from kronjax.lm.training import shrinking as courses
    from kronjax.lm.training import trainer as training
    from kronjax.lm.training.objectives import Weights
    from kronjax.lm.training.optimizer import Optimizer
    from kronjax.lm.training.settings import Settings
    from kronjax.runs.processes import meet

    weights: dict[str, Any] = {
        "next_token": next_token_weight,
        "logits": logits_weight,
        "hidden": hidden_weight,
        "attention": attention_weight,
        "temperature": temperature,
        "layers": _pairs(layer_map),
    }
    settings = Settings(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        length=length,
        optimizer=Optimizer(rate=rate, warmup=warmup, decay=decay, clip=clip or None),
        weights=Weights(**weights),
        precision=precision,
        remat=remat,
        freeze=freeze,
        shard=shard,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        keep=keep,
        seed=seed,
    )
    plan = _course(sparsity, pattern, scope, prune_steps, low_rank_to, stages, match)
    if calibrate is not None and not plan.changes:
        raise ValueError(
            "--calibrate weighs what --sparsity, --pattern or --low-rank-to take away; "
            "give one of them"
        )
    folder = storage.expanded(out if out is not None else default_folder(model))
    state = folder / training.STATE
    if distributed and shard == "none":
        raise ValueError("--distributed needs --shard data or full")
    group = meet(distributed, coordinator, processes, process)
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
        return _moments(student, calibrate, gradients=low_rank_to is not None)

    student, master = group.together(models)
    tokens, tests = group.in_turn(texts)
    measured = group.together(moments)
    try:
        result = courses.run(
            student,
            tokens,
            settings,
            plan,
            moments=measured,
            teacher=master,
            held_out=tests,
            folder=folder,
        )
    except training.Stopped as error:
        print(f"kronjax: {error}; the same line goes on", file=sys.stderr)
        return 128 + error.signal
    except Exception as error:
        group.leave(2)
        if group.processes > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"other processes are out of reach ({reason}): the same line goes on"
            ) from error
        raise

    def save():
        if group.process == 0:
            stored = dtype or str(parameter_dtype(student))
            hugging_face.save(hugging_face.cast(result.model, stored), folder)
            shutil.rmtree(state, ignore_errors=True)

    group.together(save)
    if group.process > 0:
        return 0
    if as_json:
        print(json.dumps(result.record, allow_nan=False))
        return 0
    _show(result.record, folder)
    return 0


def default_folder(model: str) -> Path:
    """Return the folder that a training of a model is written to, unless named.

    >>> default_folder("openai-community/gpt2").name, default_folder("a.gguf").name
    ('gpt2-trained', 'a-trained')
    """
    path = Path(model)
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}-trained")
    return Path(f"{path.name.removesuffix('.gguf')}-trained")


def _models(model: str, teacher: str | None) -> tuple[Any, Any]:
    """Return a model and its teacher, or None, of the same tokens."""
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
    """Return the tokens of texts, and None for None."""
    from kronjax.lm.models.base import tokenizer_of
    from kronjax.lm.text import blocks

    tokenizer = tokenizer_of(model)
    return [
        None if name is None else blocks.prepare(name, tokenizer, folder, column=column)
        for name in names
    ]


def _course(sparsity, pattern, scope, prune_steps, low_rank_to, stages, match) -> Any:
    """Return what happens to the layers on the way."""
    from kronjax.lm.training.pruning import Pruning
    from kronjax.lm.training.shrinking import Course

    pruning = None
    if sparsity is not None or pattern is not None:
        pruning = Pruning(
            sparsity,
            scope,
            pattern=None if pattern is None else _pattern(pattern),
            match=match,
            steps=prune_steps,
        )
    elif scope != "layer" or prune_steps is not None:
        raise ValueError("--scope and --prune-steps are of pruning: give --sparsity S")
    if low_rank_to is None and pruning is None and match != ("*",):
        raise ValueError(
            "--match says which layers become smaller: give --sparsity, --pattern or "
            "--low-rank-to, too"
        )
    return Course(pruning, low_rank_to, stages, match)


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
    """Return what layers see of a text, and what the loss asks of them."""
    from kronjax.lm.compression import pipeline
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.models.reading import tokens_of
    from kronjax.lm.text import documents as texts

    read = tokens_of(model, texts.read_text(name))[: pipeline.TOKENS + 1]
    return measure_moments(pipeline.precise(model), read, gradients=gradients)


def _pairs(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """Return the pairs of blocks that a map names."""
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
