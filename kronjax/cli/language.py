"""Commands for language models: evaluate, generate, export, latency.

Each command imports its modules when it runs, so that `kronjax --help` loads no jax.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kronjax.cli.options import Flag, Json, Seed, option

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], option("float32|bfloat16|float16")
]


def evaluate(
    model: Model,
    *,
    text: Annotated[str, option("FILE")],
    protocol: Annotated[str, option("NAME")] = "gptq-2048",
    column: Annotated[str, option("NAME")] = "text",
    join: Annotated[
        Literal["none", "blank-lines"], option("none|blank-lines")
    ] = "none",
    against: Annotated[str | None, option("MODEL")] = None,
    batch: Annotated[int | None, option("N")] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Measure the perplexity of a language model by a named protocol.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        text: A .txt, .jsonl or .parquet file, or dataset:OWNER/NAME:SPLIT.
        protocol: krony-pt, gptq-2048, hf-strided or lambada.
        column: Field with the text, if rows have several fields.
        join: How the lines of a .txt file are joined; the published results on WikiText
            use blank-lines.
        against: Another model to compare with, usually the dense one.
        batch: Number of windows at a time.
        dtype: Precision of parameters and products.
        as_json: Print one JSON object instead of the table.
    """
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.evaluation import perplexity as scores
    from kronjax.lm.evaluation import tables
    from kronjax.lm.models import sizes
    from kronjax.lm.text import documents as texts

    if protocol not in (*scores.PROTOCOLS, "lambada"):  # before a model is loaded
        known = ", ".join([*scores.PROTOCOLS, "lambada"])
        raise ValueError(f"no protocol {protocol!r}; there are {known}")
    read = texts.read_text(text, column=column, join=join)
    rows = []
    for name in [model, *([] if against is None else [against])]:
        stored = hugging_face.load(name)
        size = sizes.count(stored)  # in the stored dtype
        loaded = hugging_face.cast(stored, dtype)
        if protocol == "lambada":
            result = scores.lambada(loaded, read, batch=batch)
        else:
            result = scores.perplexity(loaded, read, protocol, batch=batch)
        rows.append((name, size, result))
    if as_json:
        values, *rest = (
            {
                "model": name,
                "parameters": size.parameters,
                "bytes": size.bytes,
                "flops_per_token": size.flops,
                **scores.summary(result),
            }
            for name, size, result in rows
        )
        print(json.dumps({**values, "against": rest[0] if rest else None}))
        return 0
    _show(tables.evaluation(rows), "" if against is None else tables.difference(rows))
    return 0


def generate(
    model: Model,
    *,
    prompt: Annotated[str | None, option("TEXT")] = None,
    chat: Flag = False,
    system: Annotated[str | None, option("TEXT")] = None,
    max_new_tokens: Annotated[int | None, option("N")] = None,
    temperature: Annotated[float, option("T")] = 0.0,
    top_k: Annotated[int | None, option("K")] = None,
    top_p: Annotated[float, option("P")] = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Continue a prompt, or chat.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        prompt: The text to continue; with --chat the only turn, in place of those on
            standard input.
        chat: Reply to each line of standard input, in the format of the model's chat
            template; earlier turns stay in context.
        system: With --chat, the text before the first turn.
        max_new_tokens: Largest number of tokens to add: 50, or 512 for a reply, by
            default.
        temperature: 0 always takes the most likely token; 1 samples from the model.
        top_k: Sample from the K most likely tokens only.
        top_p: Sample from the most likely tokens that together reach this probability.
        seed: Seed of the samples.
        dtype: Precision of parameters and products.
        as_json: Print one JSON object instead of the text.
    """
    if not chat and prompt is None:
        raise ValueError("there is nothing to continue; give --prompt TEXT, or --chat")
    if not chat and system is not None:
        raise ValueError("--system is for --chat only; put the text into --prompt")

    from kronjax.cli.chat import converse
    from kronjax.lm.checkpoints import hugging_face

    loaded = hugging_face.load(model, dtype=dtype)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
    options |= {"top_p": top_p, "seed": seed}
    if chat:
        fields = {
            "messages": converse(
                loaded,
                prompt=prompt,
                system=system,
                max_new_tokens=max_new_tokens,
                quiet=as_json,
                options=options,
            )
        }
    else:
        count = 50 if max_new_tokens is None else max_new_tokens
        fields = _continue(loaded, str(prompt), count, as_json, options)
    if as_json:
        fields = {"model": model, **fields, **options, "dtype": dtype}
        print(json.dumps(fields, allow_nan=False))
    return 0


def _continue(loaded, prompt: str, count: int, quiet: bool, options) -> dict[str, Any]:
    """Print the continuation of a prompt, and return it."""
    from kronjax.cli.chat import Printer
    from kronjax.lm.models import base, generation
    from kronjax.lm.text.streaming import TextStream

    tokenizer = base.tokenizer_of(loaded)
    tokens = tokenizer.encode(prompt)
    stop = generation.stop_tokens(loaded, tokenizer)
    # The prompt is printed with the first token, after it has been checked.
    printer = Printer(TextStream(tokenizer, tokens), stop, prompt)
    (new,) = generation.generate_tokens(
        loaded,
        [tokens],
        max_new_tokens=count,
        stop=stop,
        on_token=None if quiet else printer,
        **options,
    )
    if not quiet:
        printer.end()
    text = generation.continuation(tokenizer, tokens, new)
    return {"prompt": prompt, "text": text, "tokens": new}


def export(
    model: Model,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        option("float32|bfloat16|float16"),
    ] = None,
    force: Flag = False,
) -> int:
    """Write a model with every layer multiplied out, for any other program to open.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        out: The folder to write.
        dtype: Precision of the stored parameters; by default that of the model.
        force: Replace a model that is already in OUT.
    """
    from kronjax import nn
    from kronjax.lm.checkpoints import hugging_face

    if (out / "config.json").exists() and not force:
        raise ValueError(f"{out} already holds a model; --force replaces it")
    loaded = hugging_face.load(model, dtype=dtype)
    layers = nn.linear_layers(loaded)
    special = sum(not nn.is_dense(x) for x in layers.values())
    hugging_face.export(loaded, out)
    print(f"{out}: {len(layers)} linear layers, {special} of them multiplied out.")
    return 0


def latency(
    model: Model,
    *,
    batch: Annotated[int, option("N")] = 1,
    context: Annotated[int | None, option("N")] = None,
    new_tokens: Annotated[int, option("N")] = 32,
    repeats: Annotated[int, option("N")] = 5,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Compare the speed of a model with that of its dense form.

    Every compressed layer of the dense form is multiplied out.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        batch: Number of rows at a time.
        context: Number of tokens to read at once; 512, or as many as the model allows.
        new_tokens: Number of tokens to write one by one.
        repeats: Number of turns; each runs both models.
        dtype: Precision of parameters and products.
        as_json: Print one JSON object instead of the table.
    """
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.evaluation import latency as timing

    loaded = hugging_face.load(model, dtype=dtype)
    sizes: dict[str, Any] = {"batch": batch, "context": context}
    times = timing.measure_latency(
        loaded, **sizes, new_tokens=new_tokens, repeats=repeats
    )
    if as_json:
        print(json.dumps({"model": model, **timing.summary(times)}, allow_nan=False))
        return 0
    _show(timing.table(times), timing.verdict(times))
    return 0


def _show(table: Any, verdict: str) -> None:
    """Print a table and a sentence below it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(table)
    if verdict:
        console.print(verdict, soft_wrap=True)
