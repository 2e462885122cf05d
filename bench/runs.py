"""Runs of `kronjax factorize` in separate processes, timed or killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import safetensors.numpy

from bench import script

TOLERANCE = 1e-2
"""Tolerance of the runs that are killed."""

RULES = """
rules:
- match: "*"
  method: kronecker
  terms: [{a_shape: [6, 6], rank: 3}]
  weighting: none
"""


def command(name, out, tolerance):
    """Return the command that factorizes `name.safetensors` by `name.yaml`."""
    given = [f"{name}.safetensors", "--recipe", f"{name}.yaml", "--out", out]
    more = ["--tolerance", str(tolerance)]
    return [sys.executable, "-m", "kronjax", "factorize", *given, *more]


def factorize(folder, name, out, tolerance, environment=None):
    """Run the command in a folder; return its report, wall seconds and peak GiB."""
    begun = time.perf_counter()
    run = subprocess.Popen(
        [*command(name, out, tolerance), "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    assert run.stdout is not None
    output = run.stdout.read()
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise RuntimeError(f"kronjax factorize ended with {run.returncode}")
    seconds = time.perf_counter() - begun
    return json.loads(output), seconds, usage.ru_maxrss / 2**20


def span(folder, prefix):
    """Return the seconds from the first read to the last write of matching matrices."""
    begun, ended = [], []
    for path in (folder / "matrices").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["name"].startswith(prefix):
            ended.append(path.stat().st_mtime)
            begun.append(ended[-1] - record["seconds"])
    return max(ended) - min(begun)


def kill(folder, count, kills):
    """Kill runs on 36 x 36 matrices repeatedly, and compare them with a whole run."""
    rng = np.random.default_rng(1)
    matrices = rng.standard_normal((count, 36, 36)).astype(np.float32)
    tensors = {f"w.{i}": x for i, x in enumerate(matrices)}
    safetensors.numpy.save_file(tensors, folder / "small.safetensors")
    (folder / "small.yaml").write_text(RULES)
    # With a cache of programs most kills hit the solver, not the compiler.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    factorize(folder, "small", "undisturbed", TOLERANCE, cache)
    _, undisturbed, _ = factorize(folder, "small", "again", TOLERANCE, cache)
    folders, at, finished = [folder / "killed 0"], [], []
    before, lost, seen, twice = 0, 0, {}, set()
    while len(at) < kills:
        run = subprocess.Popen(
            command("small", folders[-1].name, TOLERANCE),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **cache},
        )
        wait = float(rng.uniform(0, undisturbed))
        try:
            run.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            at.append(wait)
            finished.append(note_finished(folders[-1], seen, twice))
            lost += finished[-1] < before
            before = finished[-1]
            script.say(f"killed {len(at)} times, {before} finished")
        else:  # the run has finished before its kill: begin a new folder
            note_finished(folders[-1], seen, twice)
            folders.append(folder / f"killed {len(folders)}")
            before = 0
    factorize(folder, "small", folders[-1].name, TOLERANCE, cache)
    note_finished(folders[-1], seen, twice)
    wanted = contents(folder / "undisturbed")
    contents_of_runs = [contents(each) for each in folders]
    return {
        "kills": at,
        "finished": finished,
        "runs": len(folders),
        "undisturbed_seconds": undisturbed,
        "complete": all(len(files) == count for files in contents_of_runs),
        "identical": all(files == wanted for files in contents_of_runs),
        "lost": lost,
        "solved_twice": len(twice),
    }


def note_finished(folder, seen, twice):
    """Count finished matrices, and note those whose files were written again.

    Args:
        folder: The folder of a run.
        seen: Times of writing by path, extended.
        twice: Paths that were written again, extended.
    """
    paths = factors(folder)
    for path in paths:
        written = path.stat().st_mtime_ns
        if seen.setdefault(path, written) != written:
            twice.add(path)
    return len(paths)


def contents(folder):
    """Return the bytes of all finished factors by the name of their file."""
    return {path.name: path.read_bytes() for path in factors(folder)}


def factors(folder):
    """Return the paths of all finished factors."""
    return sorted(
        x.with_suffix(".safetensors")
        for x in (folder / "matrices").glob("*.json")
        if x.with_suffix(".safetensors").exists()
    )
