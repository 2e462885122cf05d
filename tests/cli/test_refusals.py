"""Options of `kronjax compress` and `kronjax plan` that would have no effect."""

import pytest
from compressions import SPECTRAL, compress, run

TEXT_OPTION = "needs the text"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "600"), TEXT_OPTION),
        (("--refine", "10"), TEXT_OPTION),
        (("--sequential",), TEXT_OPTION),
        (("--weighting", "none"), "says itself"),
        (("--protocol", "krony-pt"), "no text to measure"),
        (("--coordinator", "127.0.0.1:1"), "go with --distributed"),
        (("--processes", "2", "--process", "1"), "go with --distributed"),
        (("--dry-run", "--distributed"), "leave out --distributed"),
        (("--dry-run", "--process", "1"), "leave out --distributed"),
        (("--tolerance", "nan"), "must be positive"),
        (("--refine", "-1"), "must not be negative"),
    ],
)
def test_options_without_effect_are_refused(folder, capsys, more, message):
    code, _, err = run(capsys, *compress(folder, *more))
    assert code == 2 and message in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "0"), "at least 1"),
        (("--sequential",), "no layer is weighted"),
        (("--sequential", "--dry-run"), "cannot know the moments"),
        (("--protocol", "krony"), "did you mean krony-pt"),
    ],
)
def test_options_that_a_text_does_not_help_are_refused(folder, capsys, more, message):
    given = compress(folder, "--calibrate", folder / "text.txt", *more)
    code, _, err = run(capsys, *given)
    assert code == 2 and message in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--weighting", "input"), TEXT_OPTION),
        (("--weighting", "none"), TEXT_OPTION),
        (("--tokens", "600"), TEXT_OPTION),
        (("--seed", "1"), "from one start"),
        (("--num-starts", "4"), "from one start"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_budget_without_a_text_takes_no_options_of_one(
    folder, capsys, command, more, message
):
    if command == "plan" and message != TEXT_OPTION:
        return
    out = folder / ("small" if command == "compress" else "small.yaml")
    given = (command, folder / "dense", "--budget", "0.5", "--out", out, *more)
    code, _, err = run(capsys, *given)
    assert code == 2 and message in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "svd-half", "--tokens", "9"), "leave out --calibrate, --tokens"),
        (("--budget", "0.5", "--weighting", "none"), "no text is read"),
    ],
)
def test_a_plan_refuses_options_without_effect(folder, capsys, more, message):
    given = ("plan", folder / "dense", "--calibrate", folder / "text.txt", *more)
    code, _, err = run(capsys, *given)
    assert code == 2 and message in err


def test_starts_are_refused_where_every_fit_has_a_single_one(folder, capsys):
    rules = SPECTRAL.replace("[8, 8]", "[8, 8], rank: 1}, {a_shape: [32, 1], rank: 1")
    rules = rules.replace("norm: spectral", "norm: frobenius")
    code, _, err = run(capsys, *compress(folder, "--num-starts", "2", rules=rules))
    assert code == 2 and "from one start" in err
    assert not (folder / "out").exists()
