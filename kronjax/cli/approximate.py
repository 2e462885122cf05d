"""`kronjax approximate`: one matrix, or a batch, from a file."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import kronjax
from kronjax.cli.options import Flag, Json, Seed, Slice, option

if TYPE_CHECKING:
    from kronjax.approximation import Approximation
    from kronjax.io.matrices import Source
    from kronjax.report import Baseline
    from kronjax.selection import Search


def approximate(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    *,
    tensor: Annotated[str | None, option("NAME")] = None,
    rows: Slice = None,
    columns: Slice = None,
    transpose: Flag = False,
    a_shape: Annotated[tuple[int, int] | None, option("M1 N1")] = None,
    rank: Annotated[int | None, option("R")] = None,
    low_rank: Annotated[int | None, option("R")] = None,
    parameters: Annotated[int | None, option("N")] = None,
    left_weight: Annotated[Path | None, option("FILE")] = None,
    right_weight: Annotated[Path | None, option("FILE")] = None,
    norm: Annotated[str, option("spectral|frobenius|schatten:P")] = "spectral",
    dtype: Annotated[
        Literal["float32", "float64"] | None, option("float32|float64")
    ] = None,
    seed: Seed = 0,
    num_starts: Annotated[int, option("N")] = 4,
    tolerance: Annotated[float, option("X")] = 2e-4,
    finish: Flag = False,
    certify: Flag = False,
    out: Annotated[Path | None, option("FILE")] = None,
    as_json: Json = False,
) -> int:
    """Approximate a matrix from a file by a short sum of Kronecker products.

    Args:
        file: A .npy, .npz or .safetensors file; leading axes are a batch of matrices.
            A file written by --out stands for the matrix that its factors multiply
            out to.
        tensor: Tensor of the file; needed where it holds several matrices.
        rows: Rows to take, as in Python: 0:768, :100 or -100:. Like --columns and
            --transpose it does not apply to the files of weights.
        columns: Columns to take.
        transpose: Transpose, after taking rows and columns.
        a_shape: Shape of the left factors: M1 divides the rows, N1 the columns.
        rank: Number of Kronecker products.
        low_rank: Number of columns times rows to add to them, or to take alone.
        parameters: Numbers that may be stored: what to mix is then searched for.
        left_weight: A matrix file, symmetric positive semidefinite: weight of the rows,
            for a kernel K in y = x @ K the second moment of x.
        right_weight: Weight of the columns: the second moment of the gradients at y.
        norm: Norm of the error that is made small.
        dtype: Precision of the computation; follows the file by default.
        seed: Seed of the perturbed starts.
        num_starts: Number of starts; the best is taken to the end.
        tolerance: Gap to the local bound that is good enough: 0.01 is one per cent.
            An estimate, and proven with --certify.
        finish: Take the answer to machine precision by Newton's method; in float64.
        certify: Prove how good the answer is: bounds that no change of one side of all
            terms, and no other sum of so many, can be below.
        out: Write the factors to this .safetensors file.
        as_json: Print one JSON object instead of the table.
    """
    from kronjax import report
    from kronjax.io import atomic, matrices
    from kronjax.io.json_values import jsonable
    from kronjax.linalg import residuals

    if out is not None:
        atomic.check_output(out, ".safetensors", source=file)
    part: dict[str, Any] = {"rows": rows, "columns": columns, "transpose": transpose}
    source = matrices.read(file, tensor=tensor, **part)
    weights = [
        path and matrices.read(path).matrix for path in (left_weight, right_weight)
    ]
    options: dict[str, Any] = {"norm": norm, "dtype": dtype}
    options |= {"num_starts": num_starts, "seed": seed, "finish": finish}
    options["tolerance"] = tolerance
    if finish and dtype is None:
        options["dtype"] = "float64"
    options |= dict(zip(("left_weight", "right_weight"), weights, strict=True))
    search = None
    if parameters is None:
        options["certify"] = certify and norm == "spectral"
        configurations = _configurations(source, a_shape, rank, low_rank)
        approximation = kronjax.approximate(source.matrix, configurations, **options)
    else:
        _refuse_contradictions(a_shape, rank, low_rank)
        if options.pop("finish"):
            raise ValueError("--finish needs --a-shape and --rank, not --parameters")
        search = kronjax.search(source.matrix, parameters, **options)
        approximation = dataclasses.replace(search.approximation, notes=search.notes)
    whitened = source.matrix
    if approximation.weighted is not None:
        whitened = residuals.whiten(source.matrix, *weights)
    baseline = report.svd_baseline(whitened, approximation.num_parameters)
    asked = {"file": atomic.readable(file), "tensor": source.name, **part, "norm": norm}
    for name, path in (("left_weight", left_weight), ("right_weight", right_weight)):
        asked[name] = path and atomic.readable(path)
    fields = {**asked, "seed": seed, **_fields(approximation, baseline)}
    certificate = approximation.certificate
    if certify and certificate is None:
        certificate = kronjax.certify(approximation, source.matrix, *weights)
    if certificate is not None:
        fields |= report.certified(certificate)
    if search is not None:
        fields["trials"] = jsonable(list(map(dataclasses.asdict, search.trials)))
    # Neither a full disk nor a closed pipe may lose what was computed.
    try:
        _print_result(approximation, baseline, fields if as_json else None, search)
        if certificate is not None and not as_json:
            print(certificate)
    finally:
        if out is not None:
            _write_terms(out, approximation, fields)
    if out is not None and not as_json:
        print(f"Factors written to {atomic.readable(out)}.")
    return 0


def _configurations(
    source: "Source",
    a_shape: tuple[int, int] | None,
    rank: int | None,
    low_rank: int | None,
) -> "list[kronjax.Configuration]":
    """Return what was asked for; a file of factors brings its own configurations."""
    from kronjax.kronecker import divisors

    m, n = source.matrix.shape[-2:]
    columns = [] if low_rank is None else [kronjax.Configuration((m, 1), low_rank)]
    if a_shape is None and rank is None and source.a_shape is None and columns:
        return columns
    if a_shape is None and source.a_shape is not None:
        a_shape, rank = source.a_shape, source.rank if rank is None else rank
        rest = [kronjax.Configuration(*pair) for pair in source.rest]
        # --low-rank takes the place of what low rank the file has.
        columns = [x for x in rest if not columns or x.a_shape != (m, 1)] + columns
    if a_shape is None:
        heights, widths = (", ".join(map(str, divisors(size))) for size in (m, n))
        raise ValueError(
            f"--a-shape M1 N1 is needed for a matrix of shape {(m, n)}: M1 divides "
            f"{m} ({heights}), N1 divides {n} ({widths}); or --parameters N, to have "
            "the shapes searched for"
        )
    if rank is None:
        most = kronjax.Configuration(a_shape, 1).max_rank((m, n))
        raise ValueError(f"--rank R is needed: from 1 to {most}, which is exact")
    return [kronjax.Configuration(a_shape, rank), *columns]


def _refuse_contradictions(*chosen: object) -> None:
    names = "--a-shape", "--rank", "--low-rank"
    given = [name for name, x in zip(names, chosen, strict=True) if x is not None]
    if given:
        raise ValueError(
            "--parameters N chooses shapes and ranks: leave out "
            f"{' and '.join(given)}, or leave out --parameters"
        )


def _fields(approximation: "Approximation", baseline: "Baseline") -> dict[str, Any]:
    """Return what `--json` prints, but for what was asked."""
    from kronjax import report

    return {
        "dtype": str(approximation.terms[0].a.dtype),
        "version": kronjax.__version__,
        **report.summary(approximation, baseline),
    }


def _print_result(
    approximation: "Approximation",
    baseline: "Baseline",
    fields: dict[str, Any] | None,
    search: "Search | None" = None,
) -> None:
    """Print the fields as JSON, or tables and what they say where there are none."""
    from kronjax import report

    if fields is not None:
        print(json.dumps(fields, allow_nan=False), flush=True)
        return
    import numpy as np
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if search is not None:
        console.print(report.trials(search))
    console.print(report.comparison(approximation, baseline))
    lines = [report.verdict(approximation, baseline), report.effort(approximation)]
    if approximation.weighted is not None:
        relative = np.mean(approximation.relative.frobenius)
        lines.append(
            f"Without the weights the relative Frobenius error is {relative:.5g}."
        )
    lines += [f"Note: {note}." for note in approximation.notes]
    console.print("\n".join(lines), soft_wrap=True)


def _write_terms(
    out: Path, approximation: "Approximation", fields: dict[str, Any]
) -> None:
    """Write the factors; of the fields, all that is short and no measurement."""
    import numpy as np

    from kronjax.io import matrices

    omitted = ("trace", "trials", "seconds", "compile_seconds")
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in fields.items()
        if key not in omitted and value is not None
    }
    (a, b), *rest = ((np.asarray(x.a), np.asarray(x.b)) for x in approximation.terms)
    matrices.write_terms(out, a, b, metadata, rest)
