"""The pages of ``docs/``: their code, the names in them, and what of the library they describe."""

import importlib
import inspect
import re
from pathlib import Path

import figures
import pages
import pytest

import jaxlora

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXTS = sorted(
    path
    for suffix in ("md", "rst")
    for path in (*DOCS.rglob(f"*.{suffix}"), *ROOT.glob(f"*.{suffix}"))
    if "_build" not in path.parts and path.name != "CHANGELOG.md"
)
PROGRAMS = [path for path in TEXTS if pages.read_steps(path.read_text())]
DIRECTIVE = re.compile(r"^\.\. (\w+):: (\S+)$", re.MULTILINE)
DESCRIBES = {"autofunction", "autoclass", "autoexception", "autodata"}


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", PROGRAMS, ids=ids(PROGRAMS))
def test_code_prints_what_the_page_shows(page):
    own_process = pages.OWN_PROCESS in page.read_text()
    faults = pages.compare_in_own_process(page) if own_process else pages.compare(page)
    assert not faults, "\n\n".join(faults)


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_tables_show_the_newest_results(page):
    assert figures.filled(page.read_text()) == page.read_text(), "run python docs/figures.py"


def test_pages_have_tables():
    shown = [page for page in TEXTS if figures.BLOCK.search(page.read_text())]
    assert {"docs/benchmarks.md", "docs/guides/claims.md"} <= set(ids(shown))


def test_pages_have_code():
    assert {"README.md", "docs/index.md", "docs/quickstart.md"} <= set(ids(PROGRAMS))


def described():
    """The full names that the API pages describe, in their order."""
    names = []
    for page in sorted((DOCS / "api").glob("*.rst")):
        module = ""
        for directive, name in DIRECTIVE.findall(page.read_text()):
            module = name if directive.endswith("module") else module
            names += [f"{module}.{name}"] if directive in DESCRIBES else []
    return names


def public():
    """What every public name is: the root's and those of the namespaces."""
    found = {}
    for module in [jaxlora, *namespaces()]:
        for name, value in members(module).items():
            if not inspect.ismodule(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def namespaces():
    named = {name.rpartition(".")[0] for name in described()} - {"jaxlora"}
    found = {name: importlib.import_module(name) for name in named}
    new = [jaxlora]
    while new:  # and those in others, as jaxlora.formats.peft
        listed = [value for value in members(new.pop()).values() if inspect.ismodule(value)]
        new += [module for module in listed if module.__name__ not in found]
        found |= {module.__name__: module for module in listed}
    return [found[name] for name in sorted(found)]


def members(module):
    """What a module says is public, or else what it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return {name: getattr(module, name) for name in names}


def test_every_public_name_stands_in_the_api_pages():
    pages_of = {id(resolve(name)) for name in described()}
    assert [name for name, value in public().items() if id(value) not in pages_of] == []


def test_api_pages_describe_public_names_once_each():
    names = described()
    assert [name for name in names if name not in public()] == []
    assert [name for name in names if names.count(name) > 1] == []


def resolve(name):
    """Return what a full name means, with `AttributeError` if it means nothing."""
    value = jaxlora
    for part in name.split(".")[1:]:
        if part.startswith("_"):
            raise AttributeError(f"{name} is private")
        if inspect.ismodule(value) and not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except ModuleNotFoundError:
                raise AttributeError(f"{value.__name__} has no {part}") from None
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_names_on_pages_exist(page):
    names = set(re.findall(r"(?<![\w./-])jaxlora(?:\.[A-Za-z]\w*)+", page.read_text()))
    missing = []
    for name in sorted(names):
        try:
            resolve(name)
        except AttributeError:
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["jaxlora.nothing", "jaxlora.merge.nothing", "jaxlora._x"])
def test_names_that_do_not_exist_are_found(name):
    with pytest.raises(AttributeError):
        resolve(name)


def page(text, folder):
    path = folder / "page.md"
    path.write_text(text)
    return path


SHOWN = """\
```python
print(1 / 3)
```

```text
{}
```
"""


@pytest.mark.parametrize(
    ("shown", "agrees"), [("0.333", False), ("0.3333333333333334", True), ("1", False)]
)
def test_runner_compares_output(shown, agrees, tmp_path):
    assert (pages.compare(page(SHOWN.format(shown), tmp_path)) == []) == agrees


def test_runner_finds_output_that_is_not_shown(tmp_path):
    assert len(pages.compare(page("```python\nprint(1)\n```\n", tmp_path))) == 1


def test_runner_shows_errors_and_warnings_as_a_line(tmp_path):
    code = "import warnings\nwarnings.warn('odd')\nraise ValueError('bad')"
    path = page(f"```python\n{code}\n```\n", tmp_path)
    pages.write(path)
    assert path.read_text().endswith("```text\nUserWarning: odd\nValueError: bad\n```\n")
    assert pages.compare(path) == []


def test_runner_gives_a_session_its_own_names(tmp_path):
    text = (
        "```python\nx = 1\n```\n```python session=other\nx += 1\nprint(x)\n```\n"
        "```text\n2\n```\n```python\nprint(x)\n```\n```text\n1\n```\n"
    )
    assert pages.compare(page(text, tmp_path)) == []


def test_runner_leaves_out_what_needs_a_module_that_is_not_there(tmp_path):
    text = "```python needs=no_such_module\nimport no_such_module\n```\n"
    assert pages.compare(page(text, tmp_path)) == []


def test_runner_runs_commands_of_the_command_line(tmp_path):
    path = page("```console\n$ jaxlora --version\n$ jaxlora inspect run\n```\n", tmp_path)
    pages.write(path)
    shown = f"{jaxlora.__version__}\njaxlora: error: no adapters at run: there is no such folder"
    assert path.read_text().endswith(f"```text\n{shown}\n```\n")
    assert pages.compare(path) == []


def test_runner_refuses_other_commands(tmp_path):
    (fault,) = pages.compare(page("```console\n$ ls\n```\n", tmp_path))
    assert "ValueError: a command must begin with '$ jaxlora': got '$ ls'" in fault


@pytest.mark.parametrize(
    ("one", "other", "agrees"),
    [
        ("loss 0.50", "loss 0.52", True),
        ("loss 0.50", "loss 0.53", False),
        ("loss 0.50", "loss -0.50", False),
        ("84.1% of 10", "84.4% of 10", True),
        ("84.1% of 10", "84.1% of 11", False),
        ("1.2e-07", "1.3e-07", True),
        ("a  1.5", "a   1.6", True),
        ("hash bb32e4946f8d7775", "hash d977ed66218d3564", True),
        ("a", "b", False),
    ],
)
def test_outputs_agree_up_to_the_last_digits(one, other, agrees):
    assert pages.agree(one, other) == agrees
