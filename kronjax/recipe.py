"""Recipes: rules over the names of layers that say how each layer is compressed.

    name: half
    ignore: h.0.*
    rules:
      - match: "h.{0..5}.mlp.*"
        method: low-rank
        fraction: 0.5
      - match: "*"
        method: keep

Names are matched by `kronjax.patterns`, as in a shell. The first rule that matches
decides; layers that no rule matches are kept. A rule that matches nothing is a mistake.
`*` stands for linear layers only: a rule applies to an embedding if it lists its exact
name, `wte`.

`targets` can be written in place of `match`. A rule does not apply to the layers that
its `ignore` matches, and no rule to those that the `ignore` of the recipe matches; an
`ignore` may match nothing, so that `lm_head`, which is never compressed, can be listed.

>>> recipe = loads('''
... rules:
...   - {targets: "h.{odd}.fc", ignore: "h.3.*", method: low-rank, rank: 2}
... ''')
>>> shapes = {f"h.{i}.fc": (8, 8) for i in range(4)}
>>> [assignment.name for assignment in resolve(recipe, shapes)]
['h.1.fc']
"""

import dataclasses
import difflib
import importlib.resources
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import yaml

from kronjax import methods, patterns
from kronjax.methods import Method
from kronjax.norm import Norm
from kronjax.patterns import Patterns

if TYPE_CHECKING:
    from kronjax.kronecker import Configuration

Positive = Annotated[int, pydantic.Field(ge=1)]
Weighting = Literal["none", "input", "input+gradient"]
Start = Literal["van-loan", "rescaled", "pruning", "random"]


def _norm(word: str) -> str:
    """Return the word for a norm as `Norm` writes it; "auto" stays."""
    return word if word == "auto" else str(Norm.parse(word))


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Term(_Strict):
    """One configuration of a sum.

    Attributes:
        a_shape: `(m1, n1)` of the left factors of a kernel `[n_in, n_out]`.
        rank: Number of terms.
    """

    a_shape: tuple[Positive, Positive]
    rank: Positive = 1


class Rule(_Strict):
    """The compression of the layers whose names match.

    Attributes:
        match: A pattern, or several; `targets` is read as the same field.
        method: Name of a method of `kronjax.methods`: `kronecker`, `low-rank`,
            `interpolative` (low rank with fewer parameters), `keep`, or one that was
            registered.
        ignore: Patterns of layers that the rule does not apply to.
        terms: The configurations of a Kronecker sum; with low rank, `(n_in, 1)`.
        rank: Rank of `low-rank` and `interpolative`.
        fraction: Parameters over those of the dense kernel, in place of the rank.
        norm: `spectral`, `frobenius`, `schatten:P`, or `auto`: Frobenius where there
            are weights, and spectral where there are none.
        weighting: Moments from calibration that the error is weighted by.
        start: Factors that training starts from: those of the fit, or of a scheme in
            the literature that trains them later.
        scalars: Whether every term of a Kronecker sum gets a scalar of its own, to be
            learned beside its factors.
    """

    match: Patterns
    method: str
    ignore: Patterns = ()
    terms: tuple[Term, ...] = ()
    rank: Positive | None = None
    fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    norm: Annotated[str, pydantic.AfterValidator(_norm)] = "auto"
    weighting: Weighting = "input"
    start: Start = "van-loan"
    scalars: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _accept_targets(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "targets" not in values:
            return values
        if "match" in values:
            raise ValueError("match and targets are the same: write one of them")
        values = dict(values)
        return {"match": values.pop("targets"), **values}

    @pydantic.field_validator("method")
    @classmethod
    def _method_is_known(cls, name: str) -> str:
        return methods.find(name).name

    @pydantic.model_validator(mode="after")
    def _belongs_together(self) -> "Rule":
        methods.find(self.method).validate(self)
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the matrix alone decides the result, without text or training."""
        plain = self.weighting == "none" and self.start == "van-loan"
        return plain or not methods.find(self.method).changes


class Recipe(_Strict):
    """Rules in order, and their origin.

    Attributes:
        rules: The rules; the first that matches a layer decides.
        name: Name of the recipe.
        source: Publication that the recipe comes from.
        model_type: Architecture it is for, such as `gpt2`; None for any.
        ignore: Patterns of layers that stay as they are, whatever the rules match.
    """

    rules: tuple[Rule, ...]
    name: str = ""
    source: str = ""
    model_type: str | None = None
    ignore: Patterns = ()


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The compression of one layer.

    Attributes:
        name: Name of the layer.
        shape: `(n_in, n_out)`.
        method: The method of the rule.
        configurations: The Kronecker sum to fit; none where the method fits by itself.
        rule: The rule that decided.
    """

    name: str
    shape: tuple[int, int]
    method: Method
    configurations: tuple["Configuration", ...]
    rule: Rule

    @property
    def num_parameters(self) -> int:
        """Number of parameters that replace the kernel."""
        return self.method.num_parameters(self.rule, self.shape)

    def stays_dense(self, width: int) -> str | None:
        """Return why a layer stays dense, or None if its new parameters are smaller.

        Args:
            width: Bytes of a parameter.
        """
        dense = width * math.prod(self.shape)
        held = self.method.num_bytes(self.rule, self.shape, width)
        if held < dense:
            return None
        return f"{held:,} bytes would replace {dense:,}"


def load(source: str | Path) -> Recipe:
    """Read a recipe by its path, or by the name of a recipe that kronjax contains.

    Raises:
        ValueError: If it is not a recipe; says where.
        OSError: If there is no such file, and no such name; lists the names.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return loads(path.read_text(encoding="utf-8"), where=str(path))
    known = builtin()
    if str(source) not in known:
        close = difflib.get_close_matches(str(source), known, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise FileNotFoundError(
            f"no recipe {source}; {guess}there are {', '.join(known)}, or write a path "
            "that ends in .yaml"
        )
    return loads(known[str(source)], where=str(source))


def loads(text: str, *, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML.

    Args:
        text: The YAML.
        where: Name of the source in messages.

    Raises:
        ValueError: If it is not a recipe; says where.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping with rules")
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [
            f"{'.'.join(map(str, mistake['loc'])) or 'recipe'}: {mistake['msg']}"
            for mistake in error.errors()
        ]
        raise ValueError(f"{where}: {'; '.join(lines)}") from error


def dumps(recipe: Recipe) -> str:
    """Write a recipe as YAML, without fields that have their default."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def builtin() -> dict[str, str]:
    """Return the YAML of the recipes that kronjax contains, by name."""
    folder = importlib.resources.files("kronjax") / "recipes"
    texts = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(texts.items()))


def resolve(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    *,
    tables: Mapping[str, tuple[int, int]] | None = None,
    model_type: str | None = None,
) -> list[Assignment]:
    """Apply the rules to the layers of a model.

    Args:
        recipe: The rules.
        shapes: `(n_in, n_out)` of each layer, in the order of the model.
        tables: `(rows, columns)` of each embedding.
        model_type: Architecture of the model, if it is known.

    Returns:
        The layers that change, in order.

    Raises:
        ValueError: If the recipe is for another architecture, a rule matches nothing,
            or a configuration does not divide its layer.
    """
    if recipe.model_type and model_type and recipe.model_type != model_type:
        raise ValueError(
            f"the recipe {recipe.name} is for {recipe.model_type}, the model is a "
            f"{model_type}"
        )
    tables = tables or {}
    matched = matches(recipe, shapes, tables)
    decided = {name: numbers[0] for name, numbers in matched.items() if numbers}
    used, assigned = set(decided.values()), []
    for named, assign in ((tables, _assign_table), (shapes, _assign)):
        for name, shape in named.items():
            rule = recipe.rules[decided[name]] if name in decided else None
            if rule is not None and methods.find(rule.method).changes:
                assigned.append(assign(rule, name, shape))
    for i, rule in enumerate(recipe.rules):
        if i not in used:
            expression = patterns.compiled(rule.match, shapes)
            raise ValueError(
                patterns.unused(rule.match, expression, [*shapes, *tables])
            )
    return assigned


def matches(
    recipe: Recipe, names: Iterable[str], tables: Iterable[str] = ()
) -> dict[str, list[int]]:
    """Return the numbers of all rules that match each name; the first decides.

    Args:
        recipe: The rules.
        names: Names of layers.
        tables: Names of embeddings, which a rule must list exactly.

    Returns:
        For each name the numbers of the rules; none where the recipe ignores it.
    """
    names = list(names)
    kept = patterns.compiled(recipe.ignore, names)
    matched: dict[str, list[int]] = {name: [] for name in (*tables, *names)}
    for number, rule in enumerate(recipe.rules):
        targets = patterns.compiled(rule.match, names)
        ignored = patterns.compiled(rule.ignore, names)
        chosen = [name for name in tables if name in patterns.as_tuple(rule.match)]
        chosen += [name for name in names if targets.fullmatch(name)]
        for name in chosen:
            if not ignored.fullmatch(name) and not kept.fullmatch(name):
                matched[name].append(number)
    return matched


def _assign(rule: Rule, name: str, shape: tuple[int, int]) -> Assignment:
    method = methods.find(rule.method)
    try:
        configurations = method.configurations(rule, shape)
        method.num_parameters(rule, shape)
    except ValueError as error:
        raise ValueError(f"{name}, by the rule for {rule.match}: {error}") from error
    return Assignment(name, shape, method, configurations, rule)


def _assign_table(rule: Rule, name: str, shape: tuple[int, int]) -> Assignment:
    takes_tables = methods.find(rule.method).takes_tables
    if not takes_tables or rule.weighting != "none" or rule.scalars:
        known = [x.name for x in methods.registered() if x.takes_tables and x.changes]
        raise ValueError(
            f"{name} is an embedding, which has no inputs to weight by: write method "
            f"{' or '.join(known)}, weighting none, and no scalars"
        )
    return _assign(rule, name, shape)
