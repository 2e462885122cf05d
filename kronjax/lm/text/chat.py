"""Chat templates: the text of a conversation in the format of a model.

A template is a program of Jinja, written by whoever published the checkpoint. It is
rendered as in transformers, with the same settings, functions and variables, in a
sandbox that gives it nothing but plain data. Its size, that of the text and the number
of its loops and calls are bounded.

>>> files = {FILE: b"{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"}
>>> render(choose(files), [{"role": "user", "content": "Hi"}])
'user: Hi'
"""

import dataclasses
import datetime
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kronjax.lm.text.special_tokens import CONFIG, read

if TYPE_CHECKING:
    import jinja2

FILE = "chat_template.jinja"
"""Name of the file with the default template."""

FOLDER = "additional_chat_templates"
"""Name of the folder with templates for other purposes, `NAME.jinja`."""

PATTERN = f"{FOLDER}/*.jinja"
"""Pattern of the paths of these templates."""

LARGEST_TEMPLATE = 2**20
"""Largest number of characters of a template."""

LARGEST_TEXT = 2**24
"""Largest number of characters of a rendered conversation, and of its parts."""

MOST_STEPS = 10**6
"""Largest number of items in loops and of calls while a conversation is rendered."""

DEFAULT, TOOLS = "default", "tool_use"
"""Names of the templates that are used without a name, and with tools."""


_STEPS = "the steps of this rendering"  # no name that a template can write


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        source: The program.
        place: File and key that hold it, for messages.
    """

    source: str = dataclasses.field(repr=False)
    place: str


class Refusal(Exception):
    """The message with which a template refuses a conversation."""


def templates(files: Mapping[str, bytes]) -> dict[str, Template]:
    """Return the templates of a checkpoint by name.

    Those in files of their own take precedence over `tokenizer_config.json`, as in
    transformers.

    Raises:
        ValueError: If one of them is no text.
    """
    found = {}
    for name, content in files.items():
        folder, _, last = name.rpartition("/")
        if name == FILE or folder == FOLDER:
            key = DEFAULT if name == FILE else last.removesuffix(".jinja")
            try:
                # As in a file opened as text.
                source = content.decode().replace("\r\n", "\n").replace("\r", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not text in UTF-8") from error
            found[key] = Template(source, name)
    given, place = read(files, CONFIG).get("chat_template"), f"{CONFIG}: chat_template"
    if found or given is None:
        return found
    if isinstance(given, str):
        return {DEFAULT: Template(given, place)}
    for entry in given if isinstance(given, list) else [None]:
        name, source = (
            entry.get(key) if isinstance(entry, Mapping) else None
            for key in ("name", "template")
        )
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(f"{place} is neither a text nor a list of named templates")
        found[name] = Template(source, f"{place}, {name}")
    return found


def choose(
    files: Mapping[str, bytes],
    chat_template: str | None = None,
    *,
    with_tools: bool = False,
) -> Template:
    """Return the template to use.

    Args:
        files: Content of the files of a tokenizer by name.
        chat_template: The name of a template, or a template; by default that of the
            checkpoint.
        with_tools: Whether there are tools, for which there may be a template.

    Raises:
        ValueError: If there is none; the message names the remedy.
    """
    found = templates(files)
    if chat_template is not None:
        if chat_template in found:
            return found[chat_template]
        if "{" in chat_template:
            return Template(chat_template, "chat_template")
        names = ", ".join(found) or "none"
        raise ValueError(f"no chat template {chat_template!r}; there are: {names}")
    for name in [TOOLS] * with_tools + [DEFAULT]:
        if name in found:
            return found[name]
    if found:
        raise ValueError(
            f"no chat template is the default; choose one of {', '.join(found)} by "
            f"name, or put it into the model's folder as {FILE}"
        )
    raise ValueError(
        "the model has no chat template, so it may not be a chat model; put the "
        f"template of its family into its folder as {FILE}, or continue a plain prompt"
    )


def render(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a conversation.

    Args:
        template: The template.
        messages: The messages, each with a `role` and its `content`.
        variables: Further variables of the template, such as special tokens.

    Raises:
        ValueError: If the template is malformed or refuses the conversation, if the
            messages are not plain data, or something is too large; the message names
            the file of the template.
    """
    import jinja2

    place = template.place
    if len(template.source) > LARGEST_TEMPLATE:
        raise ValueError(f"{place} has over {LARGEST_TEMPLATE} characters")
    if not messages or not all(isinstance(x, Mapping) for x in messages):
        raise ValueError("a conversation is a list of messages, with role and content")
    # As in transformers, a key without a value is a missing key.
    chat = [{k: v for k, v in x.items() if v is not None} for x in messages]
    try:
        # The template is given nothing with methods of its own.
        context = json.loads(json.dumps({**(variables or {}), "messages": chat}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the conversation is not plain data: {error}") from error
    context[_STEPS] = itertools.count(1)
    parts, size = [], 0
    try:
        for part in _compiled(template.source).generate(context):
            parts.append(part)
            size += len(part)
            if size > LARGEST_TEXT:
                raise OverflowError(f"the text has over {LARGEST_TEXT} characters")
    except Refusal as error:
        raise ValueError(f"{place} refuses the conversation: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{place}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template can raise anything
        kind = type(error).__name__
        raise ValueError(f"{place} cannot be rendered: {kind}: {error}") from error
    return "".join(parts)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> "jinja2.Template":
    from jinja2 import nodes

    environment = _environment()
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        loop.iter.set_lineno(loop.lineno).set_environment(environment)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.globals)


@functools.cache
def _environment() -> "jinja2.Environment":
    """Return the sandbox, which is set up as in transformers."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """The tag `generation`, which marks the tokens to train on."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call(self, context, obj, /, *args, **kwargs):
            _count(context)
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context, operator, left, right):
            if _size(operator, left, right) > LARGEST_TEXT:
                raise OverflowError(f"{operator} gives over {LARGEST_TEXT} characters")
            return super().call_binop(context, operator, left, right)

    class Namespace(jinja2.utils.Namespace):
        """Attributes that a template may set; none that Python itself would use."""

        def __init__(*args, **kwargs):
            for name in dict(*args[1:], **kwargs):
                _check_attribute(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            _check_attribute(name)
            super().__setitem__(name, value)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.filters["counted"] = jinja2.pass_context(_counted)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Namespace,
    }
    return environment


def _counted(context, items):
    """Yield the items of a loop, as long as there are not too many of all loops."""
    for item in items:
        _count(context)
        yield item


def _count(context) -> None:
    if next(context.resolve(_STEPS)) > MOST_STEPS:
        raise OverflowError(f"there are over {MOST_STEPS} items in loops and calls")


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return JSON; that of Jinja escapes characters for HTML."""
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message):
    raise Refusal(message)


def _check_attribute(name) -> None:
    if str(name).startswith("_"):
        raise AttributeError(f"{name!r}, of a namespace, begins with _")


def _size(operator: str, left: Any, right: Any) -> int:
    """Return the length of a repeated sequence, or the bits of a power of integers."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * count
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right
    return 0
