"""Run the code of Markdown pages and compare what it prints with what the pages say.

``docs/README.md`` says how pages are written. No part of this needs Sphinx.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

FENCE = re.compile(r"( *)(`{3,})(.*)")
DECIMAL = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
HASH = re.compile(r"(?<![.\w])(?=[a-f]*\d)[0-9a-f]{16}\b")
OWN_PROCESS = "<!-- own process -->"
COLUMNS = 88


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the lines ``start`` to ``end`` of its page are its content."""

    info: str
    start: int
    end: int
    indent: str
    content: str

    @property
    def language(self) -> str:
        """The first word of the info string."""
        return self.info.split()[0] if self.info.strip() else ""

    def option(self, name: str) -> str:
        """Return the value of ``name=value`` in the info string, or the empty string."""
        found = re.search(rf"\b{name}=(\S+)", self.info)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A block of code and the output that the page shows for it, if it shows any."""

    code: Block
    output: Block | None


def read_blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    lines = text.splitlines()
    opened = None
    for number, line in enumerate(lines):
        fence = FENCE.fullmatch(line)
        if fence is None:
            continue
        indent, ticks, info = fence.groups()
        if opened is None:
            opened = number + 1, indent, ticks, info
        elif len(ticks) >= len(opened[2]) and not info.strip():
            start, indent, _, info = opened
            content = "\n".join(line.removeprefix(indent) for line in lines[start:number])
            yield Block(info, start, number, indent, content)
            opened = None


def read_steps(text: str) -> list[Step]:
    """Pair the blocks of code with the blocks of text right after them."""
    lines, blocks = text.splitlines(), list(read_blocks(text))
    steps = []
    for number, block in enumerate(blocks):
        if block.language not in ("python", "console"):
            continue
        after = blocks[number + 1] if number + 1 < len(blocks) else None
        is_output = (
            after is not None
            and after.language == "text"
            and not "".join(lines[block.end + 1 : after.start - 1]).strip()
        )
        steps.append(Step(block, after if is_output else None))
    return steps


def _message(kind: type, message: object) -> str:
    return _wrapped(f"{kind.__name__}: {message}")


def _wrapped(message: str) -> str:
    lines = message.replace(os.getcwd(), "/home/you").splitlines()
    wrap = textwrap.TextWrapper(COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))


@contextlib.contextmanager
def _as_a_user() -> Iterator[None]:
    """Run in an empty directory, with JAX's defaults, and print warnings."""

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        print(_message(category, message))

    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "", DeprecationWarning, r"(?!__main__$)")  # Python's own
        warnings.filterwarnings("ignore", "Error .* persistent compilation cache entry")
        warnings.showwarning = show
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _run(code: Block, file: str, namespace: dict[str, object]) -> None:
    """Run a block; where an error names a line of Python, it is of this file."""
    if code.language == "console":
        for words in _commands(code.content):
            _print_command(words)
    else:
        exec(compile(code.content, file, "exec"), namespace)


def _commands(content: str) -> Iterator[list[str]]:
    """Yield the arguments of each line of a block of commands, ``$ jaxlora ...``."""
    for line in content.splitlines():
        if not line.startswith("$ jaxlora "):
            raise ValueError(f"a command must begin with '$ jaxlora': got {line!r}")
        yield shlex.split(line)[2:]


def _print_command(words: Sequence[str]) -> None:
    """Run the command line of the library and print what it prints, messages as those of errors."""
    from typer.testing import CliRunner

    from jaxlora.cli.application import app

    for line in CliRunner().invoke(app, words, catch_exceptions=False).output.splitlines():
        message = re.fullmatch(r"(jaxlora: \w+): (.*)", line)
        print(_wrapped(f"{message[1]}: {message[2]}") if message else line)


def run_steps(page: Path, steps: Sequence[Step]) -> list[str | None]:
    """Run the code of a page in order.

    Args:
        page: The page; where an error names a line, it is that of a block, as ``page.py:3``.
        steps: Its code.

    Returns:
        What each step printed, ``None`` where it needs a module that is not there.
    """
    namespaces: dict[str, dict[str, object]] = {}
    printed: list[str | None] = []
    with _as_a_user():
        for step in steps:
            needs = [name for name in step.code.option("needs").split(",") if name]
            if not all(importlib.util.find_spec(name) for name in needs):
                printed.append(None)
                continue
            session = step.code.option("session")
            if session not in namespaces:
                namespaces[session] = dict(namespaces.get("", {"__name__": "__main__"}))
            namespace = namespaces[session]
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                try:
                    _run(step.code, f"{page.stem}.py", namespace)
                except Exception as error:
                    message = _message(type(error), error)
                    shown = step.output.content if step.output else ""
                    if type(error).__name__ not in shown:
                        traceback.print_exc()  # nobody expects it: say where it is from
                    print(message)
            printed.append("\n".join(line.rstrip() for line in out.getvalue().splitlines()))
    return printed


def _is_close(one: str, other: str) -> bool:
    digits = [len(x.partition("e")[0].partition(".")[2]) for x in (one, other)]
    unit = 10.0 ** (int(one.partition("e")[2] or 0) - digits[0])
    a, b = float(one), float(other)
    is_near = abs(a - b) <= max(2.001 * unit, 0.01 * max(abs(a), abs(b)))
    return is_near and digits[0] == digits[1]


def _shape(text: str) -> str:
    """Return the text without decimal numbers, hashes and the widths of columns."""
    text = DECIMAL.sub("#", HASH.sub("#", text))
    return re.sub("--+", "--", re.sub(" +", " ", text))


def agree(shown: str, printed: str) -> bool:
    """Whether two outputs are the same except in the last digits of decimal numbers."""
    if _shape(shown) != _shape(printed):
        return False
    shown, printed = HASH.sub("", shown), HASH.sub("", printed)
    pairs = zip(DECIMAL.findall(shown), DECIMAL.findall(printed), strict=True)
    return all(_is_close(one, other) for one, other in pairs)


def compare(page: Path) -> list[str]:
    """Run a page and describe each place where it does not print what the page says."""
    steps = read_steps(page.read_text())
    faults = []
    for step, printed in zip(steps, run_steps(page, steps), strict=True):
        shown = step.output.content if step.output else ""
        if printed is not None and not agree(shown, printed):
            faults.append(
                f"{page}:{step.code.start}: the page shows\n{shown}\nand the code prints\n{printed}"
            )
    return faults


def write(page: Path) -> None:
    """Run a page and write what it prints into it."""
    text = page.read_text()
    lines, steps = text.splitlines(), read_steps(text)
    results = list(zip(steps, run_steps(page, steps), strict=True))
    for step, printed in reversed(results):
        shown, indent = step.output, step.code.indent
        if printed is None or agree(shown.content if shown else "", printed):
            continue
        wanted = [(indent + line).rstrip() for line in printed.splitlines()]
        if shown:
            lines[shown.start : shown.end] = wanted
        else:
            after = step.code.end + 1
            lines[after:after] = ["", f"{indent}```text", *wanted, f"{indent}```"]
    page.write_text("\n".join(lines) + "\n")


def compare_in_own_process(page: Path) -> list[str]:
    """Like `compare`, in a process where JAX has not started."""
    command = [sys.executable, __file__, str(page.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [done.stdout + done.stderr] if done.returncode else []


def main() -> None:
    """Run the pages of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, metavar="page")
    parser.add_argument("--write", action="store_true", help="write what is printed into the page")
    options = parser.parse_args()
    faults = []
    for page in options.pages:
        if len(options.pages) > 1 and OWN_PROCESS in page.read_text():
            command = [sys.executable, __file__, str(page), *(["--write"] * options.write)]
            faults += [str(page)] * subprocess.run(command, check=False).returncode
        elif options.write:
            write(page)
        else:
            faults += compare(page)
    print("\n\n".join(faults) or f"{len(options.pages)} pages: as they say")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
