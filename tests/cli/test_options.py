"""Options made of dataclasses: names, defaults and texts come from the dataclass."""

import dataclasses
import re
from typing import Annotated, Any

import pytest
import tyro

from kronjax.cli.main import main
from kronjax.cli.options import fields_of
from kronjax.lm.training.settings import Course, Optimizer, Pruning, Settings, Weights


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape.

    Attributes:
        width: Number of columns.
        names: Names of
            columns.
        scale: Factor of the entries.
        secret: Not shown.
    """

    width: int = 3
    names: tuple[str, ...] = ("a",)
    scale: float | None = None
    secret: int = 0

    def __post_init__(self):
        """Validate the fields."""
        if self.width < 1:
            raise ValueError("too narrow")


SHAPE = fields_of(Shape, without=("secret",), names={"scale": "scale-by"})


def parse(*args):
    def command(*, shape: Annotated[Any, SHAPE], other: int = 1):
        return shape, other

    return tyro.cli(command, args=args)


def test_fields_become_flat_options():
    shape, other = parse("--names", "b", "c", "--scale-by", "2", "--other", "5")
    assert other == 5
    assert Shape(**vars(shape)) == Shape(3, ("b", "c"), 2.0)
    shape, _ = parse()
    assert Shape(**vars(shape)) == Shape()


def test_the_parser_leaves_validation_to_the_dataclass():
    shape, _ = parse("--width", "0")
    with pytest.raises(ValueError, match="too narrow"):
        Shape(**vars(shape))


def test_the_help_shows_texts_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    assert "--width N Number of columns. (default: 3)" in text
    assert "--names NAME ... Names of columns. (default: a)" in text
    assert "--scale-by X Factor of the entries." in text
    assert "secret" not in text


def test_train_has_an_option_for_every_public_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = set(re.findall(r"^\W+--([\w-]+)", capsys.readouterr().out, re.M))
    weights = {"next-token", "logits", "hidden", "attention"}
    names = {
        field.name.replace("_", "-")
        for kind in (Settings, Optimizer, Weights, Pruning, Course)
        for field in dataclasses.fields(kind)
    }
    names -= {"optimizer", "weights", "evaluate-blocks", "final", "b1", "b2"}
    names -= {"pruning", "method", "begin", "every", "layers"}
    names = (names - weights) | {f"{name}-weight" for name in weights}
    assert names | {"layer-map", "prune-steps"} <= shown
