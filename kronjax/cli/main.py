"""The command line: the table of commands, and what becomes of errors.

Whatever needs jax is imported by the command that needs it, so that `--help` and most
mistakes answer at once. A mistake of the user ends with one line on standard error and
exit code 2.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

import kronjax
from kronjax.cli import (
    approximate,
    compress,
    doctor,
    factorize,
    language,
    new,
    report,
    train,
)
from kronjax.cli.console import notes_in_lines, one_line
from kronjax.cli.options import Json, Seed, option
from kronjax.io import compilation_cache

DESCRIPTION = (
    "Matrices as short sums of Kronecker products, closest in the spectral norm, and "
    "language models made of them. `kronjax --version` prints the version."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        0, or 1 if the doctor found something, 2 after an error, 130 when interrupted.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"kronjax {kronjax.__version__}")
        return 0
    if args and not {"-h", "--help"} & set(args):
        compilation_cache.cache_if_possible()
    try:
        with notes_in_lines():
            return tyro.extras.subcommand_cli_from_dict(
                {
                    "approximate": approximate.approximate,
                    "factorize": factorize.factorize,
                    "plan": compress.plan,
                    "compress": compress.compress,
                    "report": report.report,
                    "new": new.new,
                    "train": train.train,
                    "evaluate": language.evaluate,
                    "generate": language.generate,
                    "export": language.export,
                    "latency": language.latency,
                    "demo": demo,
                    "doctor": doctor.doctor,
                },
                prog="kronjax",
                description=DESCRIPTION,
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"kronjax: error: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # Only its text tells this error of jax from others, which are bugs.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (one_line(error) or "out of memory")[:200]
        print(
            f"kronjax: error: not enough memory ({reason}); take fewer matrices, "
            "--rows or --columns, or a smaller --batch",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("kronjax: interrupted", file=sys.stderr)
        return 130


def demo(
    *,
    out: Annotated[Path, option("FOLDER")] = Path("kronjax-demo"),
    matrices: Annotated[int, option("N")] = 20,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Approximate random matrices, and compress the language model that comes along.

    Prints two tables, and writes two figures and an HTML report. Takes a minute or two.

    Args:
        out: The folder for figures and report.
        matrices: Number of matrices.
        seed: Seed of the matrices.
        as_json: Print one JSON object instead of the tables.
    """
    # It compiles more than it computes. So it compiles a quarter faster, and what is
    # compiled is as fast. What the environment asks for comes last, and wins.
    flags = "--xla_backend_optimization_level=1", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join(flags)

    from kronjax import demo

    demo.run(out, matrices, seed, as_json=as_json)
    return 0
