"""How the site documents a name: `renderer` in `[tool.nbdev]` names `Reference`, and nbdev's
`show_doc` calls it once for each public definition. Nothing else imports this module; it stands
here since nbdev finds a renderer by its name alone, in whatever folder it runs."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

from fastcore.docments import docments, docstring

from ._modidx import d as INDEX

MODULES = {
    name.removeprefix(module + "."): module
    for module, names in INDEX["syms"].items()
    for name in names
}
FACE = set(import_module("hamux").__all__)
DASHES = 20, 30, 14, 48 # the widths of a table's columns to each other
MOST_RAISED = 12
MOST_VISITS = 3 # to a helper that is called with several names
MOST_DEPTH = 3 # of helpers of helpers


class Row(NamedTuple):
    "What a table says of a parameter or an attribute"
    name: str
    type: str
    default: str
    meaning: str


# --- the definition -------------------------------------------------------------------------------


def exported(thing, name: str):
    """The same thing in the package: what a page defines has no module to be read from, and belongs
    to `__main__`"""
    if name not in MODULES: return thing
    return functools.reduce(getattr, name.split("."), import_module(MODULES[name]))


def plain(thing):
    "The function behind a property, a compiled function, a bound or a static method"
    if isinstance(thing, property): thing = thing.fget
    if isinstance(thing, functools.cached_property): thing = thing.func
    if not inspect.isroutine(thing) and not inspect.isclass(thing):
        thing = getattr(thing, "fn", thing) # of `eqx.filter_custom_jvp`
    return inspect.unwrap(getattr(thing, "__func__", thing))


@functools.cache
def tree(thing) -> ast.AST:
    "The syntax of a definition"
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def comments(thing) -> dict[str, str]:
    "The comment beside each parameter, on one line"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = docments(thing, args_kwargs=True)
    return {name: " ".join(text.split()) for name, text in found.items() if text}


# --- what is said of it ---------------------------------------------------------------------------


def type_of(annotation: ast.AST | None, default: ast.AST | None) -> str:
    "A type as it is written, or that of a default that shows it"
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    if annotation is not None:
        return ast.unparse(annotation).replace("'", '"')
    value = getattr(default, "value", None)
    return type(value).__name__ if isinstance(value, bool | int | float | str) else ""


def default_of(value: ast.AST | None) -> tuple[ast.AST | None, str]:
    "A default, and its text; of `eqx.field(…)` the one inside"
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        inner = {k.arg: k.value for k in value.keywords}
        value = inner.get("default", inner.get("default_factory"))
    return value, "" if value is None else ast.unparse(value).replace("'", '"')


def named(place: ast.AST, known: dict):
    "The thing that an expression names, `lg.lagr_tanh` say; None for any other expression"
    if not isinstance(place, ast.Name | ast.Attribute): return None
    first, *rest = ast.unparse(place).split(".")
    thing = functools.reduce(lambda owner, name: getattr(owner, name, None), rest, known.get(first))
    return plain(thing) if callable(thing) else None


def passed_on(function) -> Iterator[tuple[str, object]]:
    """(parameter, function) for what is handed on under its own name: to what is called, or to what
    that is to call"""
    for node in ast.walk(tree(function)):
        if not isinstance(node, ast.Call): continue
        words = [k for k in node.keywords if isinstance(k.value, ast.Name)]
        same = [k.arg for k in words if k.value.id == k.arg]
        for place in (node.func, *node.args) if same else ():
            taker = named(place, function.__globals__)
            if inspect.isfunction(taker): yield from ((name, taker) for name in same)


def held_by(cls):
    "The public class whose methods a class gives on: that of its first field"
    if not inspect.isclass(cls): return None
    first = next(iter(cls.__dict__.get("__annotations__", {}).values()), None)
    return first if inspect.isclass(first) and first.__name__ in MODULES else None


def told_elsewhere(function) -> dict[str, str]:
    """What a parameter means where a function does not say it: what the class that it returns says
    of it, the function that it is passed on to, or the same method of a base class, or of the class
    that it holds"""
    said = {}
    returned = tree(function).returns
    made = function.__globals__.get(returned.id) if isinstance(returned, ast.Name) else None
    init = init_of(made) if inspect.isclass(made) else None
    if init and init is not function: said |= comments(init)
    for name, taker in passed_on(function):
        if name in comments(taker): said[name] = comments(taker)[name]
    owner, _, name = function.__qualname__.rpartition(".")
    cls = function.__globals__.get(owner)
    for base in (*getattr(cls, "__mro__", ())[1:], held_by(cls)) if name != "__init__" else ():
        method = getattr(base, "__dict__", {}).get(name)
        if inspect.isfunction(method) and base.__module__.startswith("hamux."):
            said = comments(method) | said
    return said


def parameters(function) -> list[Row]:
    node, said = tree(function).args, told_elsewhere(function) | comments(function)
    positional = [*node.posonlyargs, *node.args]
    unset = [None] * (len(positional) - len(node.defaults))
    pairs = list(zip(positional, [*unset, *node.defaults], strict=True))
    pairs += [(node.vararg, None)] * bool(node.vararg)
    pairs += list(zip(node.kwonlyargs, node.kw_defaults, strict=True))
    pairs += [(node.kwarg, None)] * bool(node.kwarg)
    stars = {id(node.vararg): "*", id(node.kwarg): "**"}
    rows = []
    for arg, value in pairs:
        value, text = default_of(value)
        name, meaning = stars.get(id(arg), "") + arg.arg, said.get(arg.arg, "")
        rows.append(Row(name, type_of(arg.annotation, value), text, meaning))
    return [row for row in rows if row.name not in ("self", "cls")]


def fields(cls) -> list[Row]:
    "The public fields of a class and of its bases, which speak for what it does not explain itself"
    rows = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("hamux."): continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in tree(base).body:
            if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_"): continue
            value, text = default_of(node.value)
            kind = type_of(node.annotation, value)
            said = beside(node, lines) or getattr(rows.get(node.target.id), "meaning", "")
            rows[node.target.id] = Row(node.target.id, kind, text, said)
    if inspect.isabstract(cls) or not dataclasses.is_dataclass(cls): return list(rows.values())
    made_of = [rows[f.name] for f in dataclasses.fields(cls) if f.name in rows] # in their order
    return made_of + [row for row in rows.values() if belongs_to_class(row)]


def beside(node: ast.AST, lines: list[str]) -> str:
    "The comment at the end of a field's line, or on the lines above it"
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :] # Python counts in bytes
    _, mark, comment = rest.decode().partition("#")
    if mark: return comment.strip()
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"): break
        above.insert(0, line.strip(" #"))
    return " ".join(above)


def own_fields(cls) -> set[str]:
    return {n.target.id for n in tree(cls).body if isinstance(n, ast.AnnAssign)}


def belongs_to_class(row: Row) -> bool: return row.type.startswith("ClassVar")


def own_methods(cls) -> list[ast.FunctionDef]:
    "The public methods and properties that a class's own cell documents"
    return [
        node
        for node in tree(cls).body
        if isinstance(node, ast.FunctionDef)
        and ast.get_docstring(node)
        and (node.name == "__call__" or not node.name.startswith("_"))
    ]


def is_made_by_hand(cls) -> bool:
    "Whether a user calls the class: other ones hold what only the library can give them"
    if inspect.isabstract(cls): return False
    held = dataclasses.is_dataclass(cls) and dataclasses.fields(cls) # those of its bases, too
    names = inspect.signature(cls).parameters if init_of(cls) or cls.__annotations__ or held else ()
    return bool(names) and not any(name.startswith("_") for name in names)


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


def init_of(cls):
    "The `__init__` that a person wrote, of the class or of a base; None where fields make it"
    for base in cls.__mro__:
        if not base.__module__.startswith("hamux."): continue
        if any(isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in tree(base).body):
            return plain(base.__dict__["__init__"])
    return None


def message(node: ast.AST, known: dict) -> str:
    "An error's message, with `…` for what is filled in, unless the calls that led here say it"
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.Name): return known.get(node.id, "…")
    if isinstance(node, ast.BinOp): return message(node.left, known) + message(node.right, known)
    if not isinstance(node, ast.JoinedStr): return "…"
    parts = [getattr(part, "value", part) for part in node.values]
    return "".join(part if isinstance(part, str) else message(part, known) for part in parts)


def first_sentence(text: str) -> str:
    "Of a message, without the name that it begins with where nobody said that"
    text = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(text.split()))[0]
    text = re.sub(r"…[. ]*$", "…", re.sub(r"…[ .…]*…", "…", text))
    return re.sub(r"^…: (?=\S)", "", text)


def says_something(text: str) -> bool:
    words = re.sub(r"^\w+: |must be (a )?…, got …$", "", text).strip("… .:").split()
    return len(words) > 2


def words_given(call: ast.Call, helper, known: dict) -> dict[str, str]:
    "The words that a call fills into the messages of a helper, by parameter"
    node = tree(helper).args
    names = [arg.arg for arg in (*node.posonlyargs, *node.args)]
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
    unset = dict(zip(reversed(names), reversed(node.defaults), strict=False))
    words = {
        name: message(value, known)
        for name, value in (unset | given).items()
        if not isinstance(value, ast.Constant) or isinstance(value.value, str)
    }
    return {name: text for name, text in words.items() if text.strip("… ")}


def is_told_anew(node: ast.AST) -> bool:
    "Whether an error inside may be caught, or put in other words"
    contexts = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    return isinstance(node, ast.Try) or any(isinstance(c, ast.Call) for c in contexts)


def passed_through(node: ast.AST) -> Iterator[ast.AST]:
    "The parts of a definition whose errors reach who calls it"
    for part in ast.iter_child_nodes(node):
        if is_told_anew(part): yield from (n for n in ast.walk(part) if isinstance(n, ast.Raise))
        else: yield from (part, *passed_through(part))


def raised(function) -> Iterator[tuple[str, str]]:
    "(error, message) of what a function raises itself, and then through helpers that have no page"
    queue, visits = [(function, {}, 0)], Counter()
    while queue:
        here, known, depth = queue.pop(0)
        visits[here] += 1
        if visits[here] > MOST_VISITS or depth > MOST_DEPTH: continue
        for node in passed_through(tree(here)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                error = ast.unparse(node.exc.func)
                text = first_sentence(message(node.exc.args[0], known))
                if re.fullmatch(r"[\w.]+Error", error) and says_something(text): yield error, text
            elif isinstance(node, ast.Call):
                helper = named(node.func, here.__globals__)
                if inspect.isfunction(helper) and is_helper(helper):
                    queue.append((helper, words_given(node, helper, known), depth + 1))


def is_helper(function) -> bool:
    "Whether it is ours, and not what people call"
    ours = function.__module__.startswith("hamux.")
    return ours and function.__name__ not in FACE and not inspect.isgeneratorfunction(function)


# --- on the page ----------------------------------------------------------------------------------


def quoted(code: str) -> str:
    "Code in a sentence or a table, the parts of a union apart so that each can be a link"
    return r" \| ".join(f"`{part}`" for part in re.split(r" \| (?![^\[]*\])", code)) if code else ""


def escaped(text: str) -> str:
    "A comment or a docstring as Markdown: outside of code spans a star or a bar is itself"
    plain_text = lambda part: re.sub(r"([*_|^~<$@\[\]])", r"\\\1", part)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else plain_text(p) for p in parts)


def table(rows: list[Row]) -> str:
    "A table without the columns that would be empty"
    heads = Row._fields
    filled = [i for i in range(4) if i == 0 or any(row[i] for row in rows)]
    lines = [[heads[i] for i in filled], ["-" * DASHES[i] for i in filled]]
    for row in rows:
        cells = f"`{row.name}`", quoted(row.type), quoted(row.default), escaped(row.meaning)
        lines.append([cells[i] for i in filled])
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"::: {{.api-table}}\n\n{body}\n\n:::"


def call(name: str, rows: list[Row], star: int | None) -> str:
    "How it is called, broken between arguments"
    words = [row.name + (f"={row.default}" if row.default else "") for row in rows]
    if star is not None: words.insert(star, "*")
    first, indent = f"{name}(", " " * min(len(name) + 1, 16)
    lines = [first]
    for i, word in enumerate(words):
        piece = word + (", " if i < len(words) - 1 else ")")
        if len((lines[-1] + piece).rstrip()) > 78 and lines[-1].strip() and lines[-1] != first:
            lines.append(indent)
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines) + (")" if not words else "")


def star_of(node: ast.arguments) -> int | None:
    "Where `*` stands in a call"
    if node.vararg or not node.kwonlyargs: return None
    positional = [a.arg for a in (*node.posonlyargs, *node.args)]
    return len(positional) - (positional[:1] in (["self"], ["cls"]))


def source_link(thing, module: str) -> str:
    settings, path = INDEX["settings"], module.replace(".", "/") + ".py"
    line = inspect.getsourcelines(thing)[1]
    url = f"{settings['git_url']}/blob/{settings['branch']}/{path}#L{line}"
    return f"[source]({url}){{.api-source}}"


def first_line(text: str) -> str:
    "A docstring, its first paragraph set off"
    first, _, rest = text.strip().partition("\n\n")
    first = f"[{escaped(' '.join(first.split()))}]{{.api-line}}"
    return first + (f"\n\n{escaped(rest)}" if rest else "") if text else ""


def raised_list(function) -> str:
    "What a function raises, as a list"
    errors = list(dict.fromkeys(raised(function)))
    told = [f"- `{error}`: {escaped(text)}" for error, text in errors[:MOST_RAISED]]
    more = len(errors) - MOST_RAISED
    if more > 0: told.append(f"- and {more} more, each of which says what to do")
    return "[Raises]{.api-word}\n\n" + "\n".join(told) if told else ""


def function_blocks(function, name: str) -> Iterator[str]:
    "The parts of a function's documentation"
    node, rows = tree(function), parameters(function)
    yield f"```python\n{call(name, rows, star_of(node.args))}\n```"
    yield first_line(docstring(function) or "")
    if any(row.type or row.meaning for row in rows): yield table(rows)
    said = comments(function).get("return") or told_elsewhere(function).get("return", "")
    if node.returns is not None and ast.unparse(node.returns) != "None":
        kind = quoted(type_of(node.returns, None))
        yield f"[Returns]{{.api-word}} {kind}{': ' if said else ''}{escaped(said)}"
    yield raised_list(function)


def class_blocks(cls, name: str) -> Iterator[str]:
    "The parts of a class's documentation: how it is made, and what it has"
    init, said = init_of(cls), fields(cls)
    made_of = [row for row in said if not belongs_to_class(row)]
    rows = parameters(init) if init else made_of
    if inspect.isabstract(cls): yield "*Abstract: write a subclass of it.*"
    if is_made_by_hand(cls):
        yield f"```python\n{call(name, rows, star_of(tree(init).args) if init else None)}\n```"
    yield first_line(cls.__doc__ or "")
    if any(row.type or row.meaning for row in rows): yield table(rows)
    if init: yield raised_list(init)
    taken = {row.name for row in rows}
    attributes = [row for row in said if row.name not in taken and row.name in own_fields(cls)]
    attributes += [
        Row(n.name, type_of(n.returns, None), "", " ".join(ast.get_docstring(n).split()))
        for n in own_methods(cls)
        if is_property(n)
    ]
    if attributes: yield "[Attributes]{.api-word}\n\n" + table(attributes)


def anchor(name: str) -> str:
    "The name in small letters, as nbdev links it; a class leaves that to a function of its name"
    small = name.lower()
    return f"{small}-class" if small != name and small in MODULES else small


def block(name: str, level: int, parts: Iterator[str]) -> str:
    "A heading, outside of the frame so that the table of contents has it, and what belongs to it"
    head = f"{'#' * level} {escaped(name)} {{#{anchor(name)} .api-name}}"
    return "\n\n".join([head, "::: {.api}", *filter(None, parts), ":::"])


def documentation(thing, name: str, level: int) -> str:
    "All that the site says of a name, as Markdown"
    link = source_link(thing, MODULES[name]) if name in MODULES else ""
    if not inspect.isclass(thing):
        return block(name, level, (link, *function_blocks(thing, name)))
    blocks = [block(name, level, (link, *class_blocks(thing, name)))]
    for node in own_methods(thing):
        if is_property(node): continue
        method = plain(inspect.getattr_static(thing, node.name))
        called = name if node.name == "__call__" else f"{name}.{node.name}"
        blocks.append(block(f"{name}.{node.name}", level + 1, function_blocks(method, called)))
    return "\n\n".join(blocks)


class Reference:
    "What `show_doc` returns"

    def __init__(self, thing, name: str | None = None, title_level: int = 3):
        thing = plain(thing)
        name = name or getattr(thing, "__qualname__", type(thing).__name__)
        # made here: an error in `_repr_markdown_` would be swallowed, and the name left out
        self.text = documentation(plain(exported(thing, name)), name, title_level)

    def _repr_markdown_(self) -> str: return self.text

    __repr__ = __str__ = _repr_markdown_
