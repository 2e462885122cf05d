"""`kronjax factorize` and `kronjax report`, as a user types them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from helpers import free_port

import kronjax
from kronjax import lm, recipe
from kronjax.cli.main import main
from kronjax.io import heartbeat, storage
from kronjax.runs import processes, store

RULES = """
rules:
- {match: "CON", method: low-rank, rank: 2, weighting: none}
- {match: "*", method: kronecker, terms: [{a_shape: [2, 2]}], weighting: none}
"""
LOW_RANK = "rules: [{match: '*', method: low-rank, rank: 2, weighting: none}]"


def run(capsys, *args):
    code = main([str(x) for x in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """A file of matrices, one of which holds NaN, with names that could do harm."""
    rng = np.random.default_rng(0)
    names = ["../x", "/etc/passwd", "CON", "a\x1b[31m", "e.1.w"]
    tensors = {name: rng.standard_normal((6, 8)).astype(np.float32) for name in names}
    tensors["CON"][0, 0] = np.nan
    tensors["bias"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "tensors.safetensors")
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "low_rank.yaml").write_text(LOW_RANK)
    return tmp_path


def factorize(folder, *more, source="tensors.safetensors", rules="low_rank.yaml"):
    given = ("factorize", folder / source, "--recipe", folder / rules)
    return (*given, "--out", folder / "out", *more)


def stored(folder):
    """The content of all files of factors."""
    files = (folder / "matrices").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def test_matrices_end_as_factors_and_a_report(folder, capsys):
    code, out, err = run(capsys, *factorize(folder))
    assert code == 3, err
    assert "CON" in out and "it holds NaN" in out and "stay dense" in out
    assert "The factors are in" in out
    there = {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}
    ours = {x for x in there if x.startswith("out/")}
    kept = [f"out/matrices/0000{i}" for i in range(5)]
    expected = {f"{x}.json" for x in kept} | {f"{x}.safetensors" for x in kept}
    plan = store.read_plan(storage.find(str(folder / "out")))
    failed = [x.index for x in plan.tasks if x.name == "CON"][0]
    expected -= {f"out/matrices/0000{failed}.safetensors"}
    assert ours == expected | {"out/plan.json", "out/report.html", "out/.lock-0"}
    code, out, _ = run(capsys, "report", folder / "out")
    assert code == 3 and "5 of 5 matrices are finished" in out
    assert (folder / "out" / "report.html").read_bytes().startswith(b"<!doctype")


def test_the_command_and_the_function_write_the_same_bits(folder, capsys):
    code, out, err = run(capsys, *factorize(folder, "--json", rules="rules.yaml"))
    assert code == 3, err
    records = json.loads(out)["matrices"]
    assert len(records) == 5
    solved = [x for x in records if x["status"] == "solved"]
    gaps = [x["bounds"]["gap"] for x in solved]
    assert min(gaps) < 0.01 and all(0 <= gap <= 1 for gap in gaps)
    source, rules = folder / "tensors.safetensors", folder / "rules.yaml"
    done = kronjax.factorize(source, rules, folder / "other", progress=False)
    assert stored(folder / "out") == stored(folder / "other") != {}
    assert done.record("e.1.w")["bounds"] == solved[-1]["bounds"]
    # Nothing depends on the place of the results.
    tensors = safetensors.numpy.load_file(source)
    done = kronjax.factorize(tensors, recipe.load(str(rules)), progress=False)
    assert len(done.names) == 4
    kept = safetensors.numpy.load(stored(folder / "out")["00004.safetensors"])
    for name, factor in done.factors("e.1.w").items():
        np.testing.assert_array_equal(factor, kept[name])


def test_finished_matrices_and_foreign_folders_are_respected(folder, capsys):
    assert run(capsys, *factorize(folder))[0] == 3
    before = stored(folder / "out")
    assert run(capsys, *factorize(folder))[0] == 3
    assert stored(folder / "out") == before
    code, _, err = run(capsys, *factorize(folder, "--seed", "1"))
    assert code == 2 and "another plan (seed was 0, now 1)" in err and "--force" in err
    code, out, err = run(capsys, *factorize(folder, "--seed", "1", "--force", "--json"))
    assert code == 3, err
    assert json.loads(out)["settings"]["seed"] == 1
    # A folder that holds a model, or the matrices.
    (folder / "out" / "config.json").write_text("{}")
    code, _, err = run(capsys, *factorize(folder, "--force"))
    assert code == 2 and "holds a model" in err
    code, _, err = run(capsys, *factorize(folder), "--out", folder)
    assert code == 2 and "holds a model" in err
    assert not (folder / "matrices").exists()


def test_results_of_the_former_engine_are_refused(folder, capsys):
    run(capsys, *factorize(folder))
    path = folder / "out" / "plan.json"
    former = json.dumps(json.loads(path.read_bytes()) | {"format": 1})
    path.write_text(former)
    before = stored(folder / "out")
    code, _, err = run(capsys, *factorize(folder))
    assert code == 2 and "earlier version" in err and "start anew" in err
    assert path.read_text() == former and stored(folder / "out") == before
    code, _, err = run(capsys, "report", folder / "out")
    assert code == 2 and "start anew" in err
    code, _, err = run(capsys, *factorize(folder, "--force"))
    assert code == 3, err
    assert json.loads(path.read_bytes())["format"] == 3


def test_a_page_that_cannot_be_written_is_no_failure(folder, capsys):
    (folder / "out" / "report.html").mkdir(parents=True)
    code, out, err = run(capsys, *factorize(folder))
    assert code == 3 and "The factors are in" in out, err
    code, out, err = run(capsys, "report", folder / "out")
    assert code == 3 and "5 of 5" in out and "There is no page" in err


def test_a_table_keeps_its_digits(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run(capsys, *factorize(folder))
    _, out, _ = run(capsys, "report", folder / "out")
    lines = [line for line in out.splitlines() if "6x8" in line]
    assert lines and all("4/5" in line and line.endswith("│") for line in lines)


def test_missing_and_damaged_files_are_named(folder, capsys):
    code, _, err = run(capsys, *factorize(folder, source="no.safetensors"))
    assert code == 2 and "no such file" in err and "no.safetensors" in err
    code, _, err = run(capsys, *factorize(folder, "--tolerance", "nan"))
    assert code == 2 and "must be positive" in err
    assert not (folder / "out").exists()
    run(capsys, *factorize(folder))
    kept = folder / "out" / "matrices" / "00000.json"
    before = kept.stat().st_mtime_ns
    plan = folder / "out" / "plan.json"
    plan.write_bytes(plan.read_bytes()[:100])
    code, _, err = run(capsys, *factorize(folder))
    assert code == 2 and "remove it to keep the finished" in err
    plan.unlink()
    assert run(capsys, *factorize(folder))[0] == 3
    assert kept.stat().st_mtime_ns == before


def test_names_cannot_control_a_terminal(folder, capsys):
    path = folder / "tensors.safetensors"
    tensors = {k: np.array(x) for k, x in safetensors.numpy.load_file(path).items()}
    tensors["a\x1b[31m"][...] = np.nan
    safetensors.numpy.save_file(tensors, path)
    rule = "method: low-rank, rank: 2, weighting: none}"
    text = f"rules: [{{match: 'a*', {rule}, {{match: '*', {rule}]"
    (folder / "low_rank.yaml").write_text(text)
    code, out, err = run(capsys, *factorize(folder))
    assert code == 3
    assert "both match a\\x1b[31m: the first decides" in err
    assert "a\\x1b[31m" in out and "\x1b[31m" not in out + err
    done = kronjax.factorize(path, folder / "low_rank.yaml", progress=False)
    assert "\\x1b" in repr(done) and "\x1b" not in repr(done)


def test_an_unfinished_run_has_a_report(folder, capsys):
    run(capsys, *factorize(folder))
    (folder / "out" / "matrices" / "00004.json").unlink()
    code, out, _ = run(capsys, "report", folder / "out")
    assert code == 3 and "4 of 5 matrices are finished" in out
    code, out, _ = run(capsys, "report", folder / "out", "--json")
    assert len(json.loads(out)["matrices"]) == 4
    with storage.find(str(folder / "out")).hold(0):
        code, out, _ = run(capsys, "report", folder / "out")
        assert "4 of 5" in out
        code, _, err = run(capsys, *factorize(folder))
        assert code == 2 and "another run works in" in err


def test_the_page_opens_in_a_browser(folder, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    run(capsys, *factorize(folder))
    code, _, err = run(capsys, "report", folder / "out", "--open")
    assert code == 3 and "No browser" not in err
    assert opened == [(folder / "out" / "report.html").as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    _, _, err = run(capsys, "report", folder / "out", "--open", "--json")
    assert f"the file is {folder / 'out' / 'report.html'}" in err


def test_a_dry_run_plans_and_writes_nothing(folder, capsys):
    code, out, err = run(capsys, *factorize(folder, "--dry-run", rules="rules.yaml"))
    assert code == 0, err
    assert "both match CON: the first decides" in err
    assert "Nothing was written" in out and not (folder / "out").exists()
    given = factorize(folder, "--dry-run", "--json", rules="rules.yaml")
    code, out, _ = run(capsys, *given)
    told = json.loads(out)
    assert sum(group["matrices"] for group in told["groups"]) == 5
    assert told["after"] < told["before"] and told["seconds"] > 0
    run(capsys, *factorize(folder, rules="rules.yaml"))
    code, out, _ = run(capsys, "report", folder / "out", "--json")
    done = json.loads(out)
    assert done["plan"] == told["plan"]
    dense = 48 - (6 + 8) * 2  # the matrix that failed
    assert done["after"]["parameters"] == told["after"] + dense


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_results_go_to_a_url(folder, capsys, monkeypatch, scheme):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    url = f"{scheme}://{folder}/url"
    code, out, err = run(capsys, *factorize(folder), "--out", url)
    assert code == 3, err
    assert storage.find(url).read("report.html").startswith(b"<!doctype")
    code, out, err = run(capsys, "report", url, "--open")
    assert code == 3 and "5 of 5" in out
    assert opened == [f"{url}/report.html"] * (scheme == "file")
    assert ("No browser" in err) == (scheme == "memory")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_rules_that_need_a_text_are_refused(folder, capsys, more):
    text = LOW_RANK.replace("weighting: none", "weighting: input")
    (folder / "low_rank.yaml").write_text(text)
    code, _, err = run(capsys, *factorize(folder, *more))
    assert code == 2 and "weighting: none" in err and "kronjax compress" in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--coordinator", "127.0.0.1:1"), "go with --distributed"),
        (("--processes", "2", "--process", "1"), "go with --distributed"),
        (("--dry-run", "--distributed"), "leave out --distributed"),
        (("--dry-run", "--process", "1"), "leave out --distributed"),
        (("--num-starts", "0"), "num_starts is 0"),
        (("--max-products", "0"), "max_products is 0"),
    ],
)
def test_options_without_effect_are_refused(folder, capsys, more, message):
    code, _, err = run(capsys, *factorize(folder, *more))
    assert code == 2 and message in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("more", [("--seed", "1"), ("--num-starts", "2")])
def test_starts_are_refused_where_every_fit_has_a_single_one(folder, capsys, more):
    terms = "[{a_shape: [2, 2]}, {a_shape: [6, 1], rank: 1}]"
    rule = f"method: kronecker, norm: frobenius, terms: {terms}, weighting: none"
    (folder / "low_rank.yaml").write_text(f"rules: [{{match: '*', {rule}}}]")
    code, _, err = run(capsys, *factorize(folder, *more))
    assert code == 2 and "from one start" in err
    assert not (folder / "out").exists()


def test_the_tensors_of_an_encoder_are_factorized(folder, capsys):
    config = {"model_type": "bert", "hidden_size": 8}
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    (folder / "tensors.safetensors").rename(folder / "bert" / "model.safetensors")
    code, _, err = run(capsys, *factorize(folder, source="bert"))
    assert code == 3, err


def test_the_tensors_of_a_language_model_are_taken_as_stored(
    tiny, tmp_path, capsys, monkeypatch
):
    lm.save(tiny, tmp_path / "dense")
    (tmp_path / "rules.yaml").write_text(LOW_RANK.replace("'*'", "'*.c_fc.weight'"))
    given = factorize(tmp_path, source="dense", rules="rules.yaml")
    code, out, err = run(capsys, *given, "--json")
    assert code == 0, err
    records = json.loads(out)["matrices"]
    assert [x["shape"] for x in records] == [[32, 128]] * 2
    assert json.loads(out)["before"]["parameters"] > 2 * 32 * 128


@pytest.mark.parametrize("fault", ["source", "out"])
def test_a_process_that_cannot_begin_tells_the_others(
    folder, fault, monkeypatch, capsys
):
    """Of two processes this one has no matrices, or cannot write."""
    sent = []

    def exchange(self, words):
        sent.append(list(words))
        return [[1, *words[1:]], list(words)]  # the other one is well, and agrees

    def join(*_):
        return processes.Hosts(1, 2)

    monkeypatch.setattr(processes, "join", join)
    monkeypatch.setattr(processes.Hosts, "exchange", exchange)
    if fault == "source":
        (folder / "tensors.safetensors").unlink()
    else:
        (folder / "out").write_text("a file")
    code, _, err = run(capsys, *factorize(folder, "--distributed"))
    assert code == 2 and ("no such file" in err or "cannot write" in err)
    # In the second case the matrices could be read.
    well = [(9, 1)] * (fault == "out")
    assert [(len(words), words[0]) for words in sent] == [*well, (9, 0)]


def start(folder, count, process, port, rules="low_rank.yaml"):
    given = factorize(folder, "--json", rules=rules)
    command = [sys.executable, "-m", "kronjax", *map(str, given)]
    command += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    command += ["--processes", str(count), "--process", str(process)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_the_matrices(folder, capsys, count):
    port = free_port()
    runs = [start(folder, count, i, port) for i in range(count)]
    ended = [run.communicate(timeout=300) for run in runs]
    for process, (_, err) in zip(runs, ended, strict=True):
        assert process.returncode in (0, 3), err
    told = json.loads(ended[0][0])
    assert runs[0].returncode == 3
    assert told["planned"] == len(told["matrices"]) == 5
    assert all(out == "" for out, _ in ended[1:])
    names = os.listdir(folder / "out")
    assert {f".lock-{i}" for i in range(count)} <= set(names)
    shared = stored(folder / "out")
    (folder / "out").rename(folder / "shared")
    assert run(capsys, *factorize(folder))[0] == 3
    assert stored(folder / "out") == shared


def test_processes_with_different_rules_are_refused(folder):
    port = free_port()
    runs = [start(folder, 2, 0, port, "rules.yaml")]
    runs.append(start(folder, 2, 1, port, "low_rank.yaml"))
    for process in runs:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "has other matrices or other rules" in err


def test_an_interrupted_run_resumes(folder, capsys, monkeypatch):
    code, _, err = run(capsys, *factorize(folder, rules="rules.yaml"))
    assert code == 3, err
    whole = stored(folder / "out")
    (folder / "out").rename(folder / "whole")
    put, names = store.Store.put, []

    def interrupted(self, task, *rest):
        if len(names) == 3:
            raise KeyboardInterrupt
        names.append(task.name)
        put(self, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "put", interrupted)
        code, _, err = run(capsys, *factorize(folder, rules="rules.yaml"))
    assert code == 130 and "interrupted" in err
    code, out, _ = run(capsys, "report", folder / "out")
    assert "3 of 5 matrices are finished" in out

    def watched(self, task, *rest):
        names.append(task.name)
        put(self, task, *rest)

    monkeypatch.setattr(store.Store, "put", watched)
    assert run(capsys, *factorize(folder, rules="rules.yaml"))[0] == 3
    assert len(names) == len(set(names)) == 5  # none is solved twice
    assert stored(folder / "out") == whole
