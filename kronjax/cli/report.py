"""`kronjax report`: the results of kronjax compress or kronjax factorize."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from kronjax.cli.compress import WORK, show_model
from kronjax.cli.factorize import FAILURE, show_matrices
from kronjax.cli.options import Json, option

if TYPE_CHECKING:
    from kronjax.io.storage import Storage


def report(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    open_it: Annotated[bool, option(name="open")] = False,
    as_json: Json = False,
) -> int:
    """Show the report of kronjax compress or kronjax factorize, finished or not.

    Args:
        folder: Folder or URL that one of them wrote, or is writing.
        open_it: Open the page in a browser.
        as_json: Print the record as one JSON object.

    Returns:
        0, or 3 if a layer or matrix failed and stays dense.
    """
    from kronjax.io import storage
    from kronjax.lm.compression import fits, record
    from kronjax.runs.store import read_plan

    place = storage.find(folder)
    if place.read(record.NAME) is None:
        for run in (place, *reversed(fits.stores(f"{folder.rstrip('/')}/{WORK}"))):
            if read_plan(run) is not None:
                return _factorization(run, open_it, as_json)
    return _model(place, open_it, as_json)


def _model(place: "Storage", open_it: bool, as_json: bool) -> int:
    """Print the record of a compressed model, and write its page."""
    from kronjax.lm.compression import html, record

    contents = record.load(place)
    if open_it or not as_json:
        place.write(html.NAME, html.page(contents).encode())
    if as_json:
        print(json.dumps(contents, allow_nan=False))
    else:
        show_model(contents, str(place))
    if open_it:
        _open(place, html.NAME)
    failed = [x for x in contents["layers"] if x.get("status") == "failed"]
    return FAILURE if failed else 0


def _factorization(place: "Storage", open_it: bool, as_json: bool) -> int:
    """Print the finished matrices at a place, and write their page."""
    from kronjax.runs import html
    from kronjax.runs.store import Store, read_plan
    from kronjax.runs.summary import Factorization

    plan = read_plan(place)
    assert plan is not None
    results = Factorization.of(Store(place, plan))
    show_matrices(results, as_json)
    problem = html.write(results)
    if problem is not None:
        print(f"There is no page: {problem}", file=sys.stderr)
    elif not as_json:
        print(f"{place}/{html.NAME} shows every matrix.")
    if open_it:
        _open(place, html.NAME)
    return FAILURE if results.failed else 0


def _open(place: "Storage", name: str) -> None:
    """Open a file in a browser; say where it is if that is impossible."""
    import webbrowser

    from kronjax.io.storage import LocalFolder

    if isinstance(place, LocalFolder):
        path = place.path / name
        if path.is_file() and webbrowser.open(path.resolve().as_uri()):
            return
    print(f"No browser could be opened; the file is {place}/{name}.", file=sys.stderr)
