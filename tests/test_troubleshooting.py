"""The page about errors and warnings, against the ``raise`` and ``warn`` of the library.

A message is a template: its text, with a hole for each value. The page quotes the beginning of a
message with ``…`` for what varies. Each quotation has to be one of a template, and each template
has to be quoted.
"""

import ast
import re
from pathlib import Path

import pytest

import jaxlora

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
HOLE = "…"
INSIDE = {  # parts of another message, which are its reason; and what a user cannot meet
    "storage/description.py",
    "tracing/registry.py",
    "what was written is not what was to be saved",
    "the arrays … are missing",
    "an array must be …: got …",
    "module 'jaxlora' has no attribute …",
    "… (in process …)",  # behind a message of another process
}
OF_OTHERS = {  # of JAX and Python
    "Array has been deleted",
    "Cannot deserialize a PyTreeDef containing an unregistered type",
    "Incompatible shapes",
    "LoRAConfig.__init__() got an unexpected keyword argument 'r'",
    "init() missing 1 required keyword-only argument: 'config'",
}


def text_of(node, names):
    """Return a message with holes, None for what is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(value, names) or HOLE for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(attr=name):
            return names.get(name)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (text_of(left, names) or HOLE) + (text_of(right, names) or HOLE)
        case ast.Call(func=ast.Name(id=name)):
            return names.get(f"{name}()")
    return None


def assigned(scope, names):
    """Return the texts that names of a scope stand for, with those of outer scopes."""
    found = {}
    for node in ast.walk(scope):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, []).append(text_of(value, names))
            case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value):
                if found.get(name, [None])[-1]:
                    found[name][-1] += text_of(value, names) or HOLE
            case ast.FunctionDef(name=name, body=[*_, ast.Return(value=ast.JoinedStr() as value)]):
                found[f"{name}()"] = [text_of(value, names)]
    return names | {name: texts[0] for name, texts in found.items() if len(texts) == 1}


def messages_of(call, names):
    """Yield the messages of a call that makes an exception or warns."""
    for argument in call.args[:2]:
        if text := text_of(argument, names):
            yield text


def calls(function):
    """Yield the calls of a function that make an exception to raise, or warn."""
    for node in ast.walk(function):
        match node:
            case ast.Raise(exc=ast.Call() as call):
                yield call
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                if name in ("warn", "warn_explicit"):
                    yield node


def templates():
    """Return every message of the library, with where it stands."""
    files = sorted((ROOT / "jaxlora").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    constants = {}
    for tree in trees.values():
        constants |= {k: v for k, v in assigned(tree, {}).items() if k.isupper()}
    found = {}
    for path, tree in trees.items():
        outer = constants | {k: v for k, v in assigned(tree, {}).items() if k.endswith("()")}
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            names = assigned(function, outer)
            for call in calls(function):
                for text in messages_of(call, names):
                    message = re.sub(rf"{HOLE}+", HOLE, text)
                    where = path.relative_to(ROOT / "jaxlora").as_posix()
                    found[message] = f"{where}:{call.lineno}"
    return {text: where for text, where in found.items() if len(words(text)) > 1}


def words(text):
    return re.findall(r"[^\W\d_]{2,}", text)


def pieces(text):
    """Return the words and holes of a message in order; holes that touch are one."""
    found = re.findall(rf"{HOLE}|\s+|[^\s{HOLE}]", text)
    return [" " if piece.isspace() else piece for piece in found]


def pattern(template):
    """Return the expression of every beginning of a message; it may end at a hole with ``…``."""
    expression, starts_open = "", pieces(template)[0] == HOLE
    first = f"(?:'?{HOLE}'?|[^{HOLE}]+?)"  # it does not take in what is written behind it
    for piece in reversed(pieces(template)[:120]):
        hole = ("(?s:.+?)", f"(?:(?<={HOLE})|(?<={HOLE}'))$")
        one, end = hole if piece == HOLE else (re.escape(piece), "$")
        expression = f"{one}(?:{end}|{expression})" if expression else f"{one}$"
    return re.compile(expression.replace("(?s:.+?)", first, 1) if starts_open else expression)


def quoted():
    """Return the messages that the page quotes: what stands before the colon of an entry."""
    found = []
    for entry in re.findall(r"^- (.*(?:\n  .*)*)", PAGE, re.MULTILINE):
        head = re.match(r"(?:[^`:]*`[^`]*`)+?(?=:\s)", entry)
        if head and entry.startswith("`"):
            found += re.findall(r"`([^`]*)`", re.sub(r"\s+", " ", head[0]))
    return found


QUOTED = [message for message in quoted() if message not in OF_OTHERS]
TEMPLATES = templates()
TOLD = [text for text, where in TEMPLATES.items() if not {text, where.partition(":")[0]} & INSIDE]


def test_messages_are_found():
    assert len(TEMPLATES) > 150
    assert len(QUOTED) > 150


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_one_of_the_library(message):
    assert len(words(message)) > 1
    assert any(pattern(template).match(message) for template in TEMPLATES)


@pytest.mark.parametrize("template", TOLD)
def test_every_message_is_quoted(template):
    found = [message for message in QUOTED if pattern(template).match(message)]
    assert found, f"{TEMPLATES[template]}: {template}"


def test_every_kind_of_warning_has_a_section():
    kinds = [
        name
        for name, value in vars(jaxlora).items()
        if isinstance(value, type) and issubclass(value, Warning)
    ]
    assert len(kinds) >= 2
    sections = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert {*kinds, "UserWarning"} == set(sections)


@pytest.mark.parametrize("message", ["target '…' matches nothing", "the weight is broken"])
def test_messages_that_there_are_not_are_found(message):
    assert not any(pattern(template).match(message) for template in TEMPLATES)
