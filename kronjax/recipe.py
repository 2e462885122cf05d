"""Recipes: rules over the names of layers that say what each of them becomes.

    name: half
    rules:
      - match: "h.{0..5}.mlp.*"
        method: low-rank
        fraction: 0.5
      - match: "*"
        method: keep

Names are matched as in a shell: `*` is any text and `?` any character, `{fc,proj}` one
of several, `{0..5}` a number in a range, `{odd}` and `{even}` the numbers of blocks,
`{early}`, `{middle}` and `{late}` a third of them. The first rule that matches decides;
what no rule matches is kept. A rule that matches nothing is a mistake. Embeddings are
meant only by rules that give their very names, `wte`, so that `*` is all linear layers.

>>> recipe = loads('''
... rules:
...   - {match: "h.{odd}.fc", method: low-rank, rank: 2}
... ''')
>>> [one.name for one in resolve(recipe, {f"h.{i}.fc": (8, 8) for i in range(4)})]
['h.1.fc', 'h.3.fc']
"""

import dataclasses
import difflib
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml

from kronjax.kronecker import Configuration, interpolative_rank
from kronjax.norm import Norm

Positive = Annotated[int, pydantic.Field(ge=1)]
Method = Literal["kronecker", "low-rank", "interpolative", "keep"]
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
    """What the layers become whose name matches.

    Attributes:
        match: A pattern, or several.
        method: `kronecker`, `low-rank`, `interpolative` (low rank with fewer numbers,
            `nn.InterpolativeLinear`) or `keep`.
        terms: The configurations of a Kronecker sum; with low rank, `(n_in, 1)`.
        rank: Of `low-rank` and `interpolative`.
        fraction: Of those, in the place of the rank: parameters over those of the dense
            kernel.
        norm: `spectral`, `frobenius`, `schatten:P`, or `auto`: Frobenius where there
            are weights, and spectral where there are none.
        weighting: What the error is weighted by, from calibration.
        start: Where a solve starts, or all there is to it in schemes that train later.
        scalars: Whether every term of a Kronecker sum gets a scalar of its own, to be
            learned beside its factors.
    """

    match: str | tuple[str, ...]
    method: Method
    terms: tuple[Term, ...] = ()
    rank: Positive | None = None
    fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    norm: Annotated[str, pydantic.AfterValidator(_norm)] = "auto"
    weighting: Weighting = "input"
    start: Start = "van-loan"
    scalars: bool = False

    @pydantic.model_validator(mode="after")
    def _belongs_together(self) -> "Rule":
        has_rank = not self.terms and (self.rank is None) != (self.fraction is None)
        wanted = {
            "kronecker": bool(self.terms) and self.rank is None is self.fraction,
            "low-rank": has_rank,
            "interpolative": has_rank,
            "keep": not self.terms and self.rank is None is self.fraction,
        }
        if self.scalars and self.method != "kronecker":
            raise ValueError("scalars are those of the terms of method kronecker")
        if not wanted[self.method]:
            needs = {
                "kronecker": "terms, and neither rank nor fraction",
                "low-rank": "either rank or fraction, and no terms",
                "interpolative": "either rank or fraction, and no terms",
                "keep": "neither terms nor rank nor fraction",
            }
            raise ValueError(f"method {self.method} takes {needs[self.method]}")
        return self


class Recipe(_Strict):
    """Rules in order, and where they come from.

    Attributes:
        rules: The first that matches a layer decides.
        name: Of the recipe.
        source: Where it was published.
        model_type: The architecture it is for, such as `gpt2`; None for any.
    """

    rules: tuple[Rule, ...]
    name: str = ""
    source: str = ""
    model_type: str | None = None


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What one layer becomes.

    Attributes:
        name: Of the layer.
        shape: `(n_in, n_out)`.
        configurations: Of its sum.
        rule: The rule that decided.
    """

    name: str
    shape: tuple[int, int]
    configurations: tuple[Configuration, ...]
    rule: Rule

    @property
    def num_parameters(self) -> int:
        """Numbers that are stored."""
        if self.rule.method == "interpolative":
            (one,) = self.configurations
            return one.rank * (sum(self.shape) - one.rank)
        terms = sum(one.num_parameters(self.shape) for one in self.configurations)
        scalars = sum(one.rank for one in self.configurations) * self.rule.scalars
        return terms + scalars


def load(source: str | Path) -> Recipe:
    """Read a recipe by its path, or by the name of one that comes with kronjax.

    Raises:
        ValueError: If it is no recipe; says where.
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
        where: What messages call it.

    Raises:
        ValueError: If it is no recipe; says where.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds no mapping with rules")
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [
            f"{'.'.join(map(str, one['loc'])) or 'recipe'}: {one['msg']}"
            for one in error.errors()
        ]
        raise ValueError(f"{where}: {'; '.join(lines)}") from error


def dumps(recipe: Recipe) -> str:
    """Write a recipe as YAML, without what is as by default."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def builtin() -> dict[str, str]:
    """Return the YAML of the recipes that come with kronjax, by name."""
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
        model_type: Of the model, if it is known.

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
    used, found = set(decided.values()), []
    for names, assign in ((tables, _assign_table), (shapes, _assign)):
        for name, shape in names.items():
            rule = recipe.rules[decided[name]] if name in decided else None
            if rule is not None and rule.method != "keep":
                found.append(assign(rule, name, shape))
    for i, rule in enumerate(recipe.rules):
        if i not in used:
            raise ValueError(
                _unused(rule, _expression(rule, shapes), [*shapes, *tables])
            )
    return found


def matching(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that a pattern, or one of several, matches, in their order.

    >>> matching("h.{early}.*", ["h.0.fc", "h.1.fc", "h.2.fc", "lm_head"])
    ['h.0.fc']

    Raises:
        ValueError: If a pattern matches none of them.
    """
    names = list(names)
    rules = [
        Rule(match=one, method="keep")
        for one in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    expressions = [_expression(rule, names) for rule in rules]
    for rule, expression in zip(rules, expressions, strict=True):
        if not any(map(expression.fullmatch, names)):
            raise ValueError(_unused(rule, expression, names))
    return [name for name in names if any(x.fullmatch(name) for x in expressions)]


def matches(
    recipe: Recipe, names: Iterable[str], tables: Iterable[str] = ()
) -> dict[str, list[int]]:
    """Return the numbers of all rules that match each name; the first decides.

    Args:
        recipe: The rules.
        names: Of layers.
        tables: Names of embeddings, which patterns do not match.
    """
    names = list(names)
    expressions = [_expression(rule, names) for rule in recipe.rules]
    found = {
        name: [i for i, rule in enumerate(recipe.rules) if name in _patterns(rule)]
        for name in tables
    }
    for name in names:
        found[name] = [i for i, one in enumerate(expressions) if one.fullmatch(name)]
    return found


def _assign(rule: Rule, name: str, shape: tuple[int, int]) -> Assignment:
    m, n = shape
    if rule.method in ("low-rank", "interpolative"):
        if rule.rank is not None:
            rank = rule.rank
        else:
            assert rule.fraction is not None
            budget = int(rule.fraction * m * n)
            rank = budget // (m + n)
            if rule.method == "interpolative":
                rank = interpolative_rank(shape, budget)
            rank = max(rank, 1)
        configurations = (Configuration((m, 1), rank),)
    else:
        configurations = tuple(Configuration(x.a_shape, x.rank) for x in rule.terms)
    try:
        for one in configurations:
            most = one.max_rank(shape)
            if one.rank > most:
                raise ValueError(
                    f"rank {one.rank} is more than the {most} that is exact"
                )
    except ValueError as error:
        raise ValueError(f"{name}, by the rule for {rule.match}: {error}") from error
    return Assignment(name, shape, configurations, rule)


def _assign_table(rule: Rule, name: str, shape: tuple[int, int]) -> Assignment:
    if rule.method == "interpolative" or rule.weighting != "none" or rule.scalars:
        raise ValueError(
            f"{name} is an embedding, which has no inputs to weight by: write method "
            "kronecker or low-rank, weighting none, and no scalars"
        )
    return _assign(rule, name, shape)


def _expression(rule: Rule, names: Iterable[str]) -> re.Pattern[str]:
    """Return the patterns of a rule as one regular expression."""
    numbers = [
        int(part) for name in names for part in name.split(".") if part.isdigit()
    ]
    blocks = max(numbers, default=-1) + 1
    text = "|".join(_translate(one, blocks) for one in _patterns(rule))
    return re.compile(text, re.DOTALL)  # names of tensors may hold anything


def _patterns(rule: Rule) -> tuple[str, ...]:
    return (rule.match,) if isinstance(rule.match, str) else rule.match


def _translate(pattern: str, blocks: int) -> str:
    third = range(0, blocks + 1)
    first, second = (round(blocks * k / 3) for k in (1, 2))
    words = {
        "odd": third[1:blocks:2],
        "even": third[0:blocks:2],
        "early": third[:first],
        "middle": third[first:second],
        "late": third[second:blocks],
    }
    parts = []
    for token in re.findall(r"\{[^{}]*\}|.", pattern, re.DOTALL):
        if token == "*":
            parts.append(".*")
        elif token == "?":
            parts.append(".")
        elif not token.startswith("{"):
            parts.append(re.escape(token))
        else:
            inside = token[1:-1]
            numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
            if numbers:
                low, high = map(int, numbers.groups())
                options = [str(i) for i in range(low, min(high, blocks) + 1)]
            elif inside in words:
                options = [str(i) for i in words[inside]]
            else:
                options = [_translate(one, blocks) for one in inside.split(",")]
            parts.append(f"(?:{'|'.join(options)})" if options else "(?!)")
    return "".join(parts)


def _unused(rule: Rule, expression: re.Pattern[str], names: Iterable[str]) -> str:
    """Say why a rule decided nothing: no name is like it, or others came first."""
    names = list(names)
    if any(expression.fullmatch(name) for name in names):
        return (
            f"the rule for {rule.match} decides nothing: rules before it match all of "
            "its layers; put it before them"
        )
    pattern = _patterns(rule)[0]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    hint = f"layers are named like {', '.join(close or names[:3])}"
    return f"the rule for {rule.match} matches no layer; {hint}"
