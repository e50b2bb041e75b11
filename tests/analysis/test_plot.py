"""Pictures hold what was found: the numbers drawn are read from the axes."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from cases import normal
from matplotlib import pyplot
from numpy.testing import assert_allclose
from test_spectra import adapter

from jaxlora import analysis
from jaxlora.analysis import plot

pytestmark = pytest.mark.once
mpl.use("agg")
wrongly: Any = plot


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def image(ax):
    """Return what a heat map shows."""
    return np.asarray(ax.images[0].get_array(), float)


def drawn(line):
    """Return the heights of a line."""
    return np.asarray(line.get_ydata(), float)


def layers():
    """Return the spectra of two kinds of weights in two layers, and of a stack."""
    adapters = {
        f"block_{i}/{name}": adapter(normal(i, 8, 3), normal(i + 2, 3, 6))
        for i in range(2)
        for name in ("up", "down")
    }
    base = {name: normal(9, 8, 6) for name in adapters}
    return analysis.spectrum(adapters), analysis.spectrum(adapters, _nested(base))


def _nested(leaves):
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        block, name = path.split("/")
        tree.setdefault(block, {})[name] = leaf
    return tree


def test_spectra_are_a_line_each():
    found, _ = layers()
    ax = plot.spectra(found)
    lines = {line.get_label(): drawn(line) for line in ax.lines}
    assert lines.keys() == {f"block_*/{n}, layer {i}" for n in ("up", "down") for i in range(2)}
    assert_allclose(lines["block_*/down, layer 1"], found["block_1/down"].values)
    assert legend(ax) == ["block_*/up", "block_*/down"]
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_ylabel() == "layer"


def legend(ax):
    """Return what a legend names."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("layer_count", [1, 32])
def test_lines_are_told_apart_by_their_style_and_the_color_of_their_layer(layer_count):
    names = [f"layer_{i}/weight_{k}" for i in range(layer_count) for k in range(8)]
    found = analysis.spectrum({x: adapter(normal(0, 8, 3), normal(1, 3, 6)) for x in names})
    lines = plot.spectra(found).lines
    looks = {(str(x.get_linestyle()), str(x.get_marker()), str(x.get_color())) for x in lines}
    assert len(lines) == len(looks) == 8 * layer_count


def test_nothing_was_learned_yet():
    found = analysis.spectrum({"w": adapter(normal(0, 8, 3), np.zeros((3, 6), np.float32))})
    ax = plot.spectra(found)
    ax.figure.canvas.draw()  # where matplotlib warns of logarithms of zero
    assert_allclose(drawn(ax.lines[0]), 0)


@pytest.mark.parametrize("count", [3, 12, 40])
def test_names_along_an_axis_are_few(count):
    weights = {f"layer_{i}/w": adapter(normal(i, 8, 2), normal(1, 2, 6)) for i in range(count)}
    ax = plot.energy(analysis.spectrum(weights))
    shown = {int(x.get_position()[0]): x.get_text() for x in ax.get_xticklabels()}
    assert all(text == str(at) for at, text in shown.items())
    assert min(count, 10) <= len(shown) <= 12


@pytest.mark.parametrize("with_base", [False, True])
def test_energy_is_a_row_for_each_kind(with_base):
    found = layers()[with_base]
    ax = plot.energy(found)
    rows = image(ax)
    kinds = [text.get_text() for text in ax.get_yticklabels()]
    assert sorted(kinds) == ["block_*/down", "block_*/up"]
    for row, kind in enumerate(kinds):
        each = [found[kind.replace("*", f"{i}")] for i in range(2)]
        assert_allclose(rows[row], [x.share if with_base else x.norm for x in each])


def test_entries_of_a_stack_are_layers_unless_the_path_has_some():
    stack = adapter(normal(0, 3, 8, 2), normal(1, 3, 2, 6))
    ax = plot.energy(analysis.spectrum({"layers/up": stack}))
    assert image(ax).shape == (1, 3)
    ax = plot.energy(analysis.spectrum({"layer_4/experts": stack}))
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        f"layer_*/experts[{i}]" for i in range(3)
    ]


def test_similarity_is_a_heat_map_from_0_to_1():
    one = {"w": adapter(normal(0, 8, 3), normal(1, 3, 6))}
    other = {"w": adapter(normal(2, 8, 2), normal(3, 2, 6))}
    phi = analysis.similarity(one, other)["w"]
    _, ax = pyplot.subplots()
    assert plot.similarity(phi, ax) is ax
    assert_allclose(image(ax), phi)
    assert ax.images[0].get_clim() == (0, 1)
    for axis in (ax.xaxis, ax.yaxis):
        assert all(tick == int(tick) for tick in axis.get_majorticklocs())


def test_training_is_drawn_with_its_running_mean():
    losses = np.linspace(2, 1, 40)
    ax = plot.training({"lora": losses, "full": [1.0]})
    mean, raw = ax.lines[:2]
    assert_allclose(drawn(raw), losses)
    assert_allclose(drawn(mean), (losses[1:] + losses[:-1]) / 2)
    assert legend(ax) == ["lora", "full"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: wrongly.spectra({}),
            TypeError,
            "must be from jaxlora.analysis.spectrum: got dict",
        ),
        (
            lambda: wrongly.energy(None),
            TypeError,
            "must be from jaxlora.analysis.spectrum: got None",
        ),
        (lambda: wrongly.similarity([[1.0]]), TypeError, r"phi must be an array \(r1, r2\)"),
        (lambda: wrongly.similarity(normal(0, 2, 2, 2)), ValueError, r"of one weight, \(r1, r2\)"),
        (lambda: wrongly.similarity(normal(0, 2, 2), 3), TypeError, "ax must be an Axes"),
        (
            lambda: wrongly.training([1.0]),
            TypeError,
            "losses must be numbers by the name of the run",
        ),
        (lambda: wrongly.training({}), ValueError, "at least one run: got none"),
        (lambda: wrongly.training({"a": []}), ValueError, r"losses\['a'\] must have at least one"),
        (lambda: wrongly.training({"a": ["x"]}), TypeError, r"losses\['a'\]\[0\] must be a number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
