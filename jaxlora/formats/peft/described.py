"""The tree that a folder of PEFT describes by itself, read without the program that it is for.

A module's tensors tell the sizes of its weight, and its name gives a path: the weight of the linear
layer ``encoder.0.query`` is the leaf ``encoder/0/query/kernel``, ``(in, out)``. That is enough to
read the folder as `jaxlora.formats.peft.load` does, and to write it again. What only the program
tells, as which parameter is a stack of experts, is refused.
"""

import dataclasses
import os
from collections.abc import Container, Mapping
from pathlib import Path

import jax.numpy as jnp

from jaxlora.formats import arguments, factors, tensors
from jaxlora.formats.factors import Tensors
from jaxlora.formats.names.mapping import Names, module_and_tensor
from jaxlora.formats.names.pairs import Given, Layout
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import projections, reading
from jaxlora.formats.peft.folder import Folder
from jaxlora.formats.source import Source
from jaxlora.targets.sites import Site, Sites
from jaxlora.tracing.recorder import Kind, Use
from jaxlora.weights.roles import Roles

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Described:
    """What folders tell of the tree that they are for.

    Attributes:
        modules: the layout and the shape of each weight by the name of its module, as a tree of
            Flax has it: ``(*window, in, out)``, or ``(rows, columns)`` of an embedding.
        others: the layouts, names of modules or tensors, and shapes of what else is replaced, by
            path; it lies in the tree as in the file.
    """

    modules: Mapping[str, tuple[Layout, Shape]]
    others: Mapping[str, tuple[Layout, str, Shape]]

    def __or__(self, other: "Described") -> "Described":
        return Described({**self.modules, **other.modules}, {**self.others, **other.others})

    @property
    def names(self) -> Names:
        """The names of modules, and the paths that follow from them."""
        by_layout: dict[Layout, dict[str, str]] = {}
        for module, (layout, _) in self.modules.items():
            by_layout.setdefault(layout, {})[module] = path_of(module, layout)
        for path, (layout, name, _) in self.others.items():
            by_layout.setdefault(layout, {})[name] = path
        return Names(*(pair(paths, layout) for layout, paths in by_layout.items()))

    @property
    def sites(self) -> Sites:
        """The weights that are adapted, as programs commonly use them."""
        sites, shapes = {}, {path: shape for path, (*_, shape) in self.others.items()}
        for module, (layout, shape) in self.modules.items():
            path = path_of(module, layout)
            sites[path], shapes[path] = _site(path, layout, shape), shape
        return Sites(sites, {}, shapes)


def described(folder: str | os.PathLike[str]) -> Described:
    """Return what a folder tells of the tree that it is for.

    Args:
        folder: a folder as `jaxlora.formats.peft.load` takes it.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: a file is damaged, or the folder does not tell.
    """
    return arguments.read(folder, _described, configs.CONFIG_FILE)


def _described(place: Path) -> Described:
    config = configs.read(place)
    with tensors.opened(reading.tensors_path(place)) as file:
        opened = Folder(file, Sites({}, {}, {}), {}, config)
        modules, values, tokens = opened.keys()
        if parameters := config.get("target_parameters"):
            raise ValueError(_untold(opened, f"which axes of {parameters[0]!r} are experts"))
        if tokens:
            raise ValueError(_untold(opened, f"how many rows {tokens[0].module!r} has"))
        found = {module: _weight(opened, own) for (module, _), own in modules.items()}
        whole = {key.module: file.shapes[key.name] for key in values}
    return Described(found, _others(whole, found))


def _others(
    whole: Mapping[str, Shape], modules: Container[str]
) -> dict[str, tuple[Layout, str, Shape]]:
    """Return what is replaced of a tree, by path, for the shapes of tensors by name."""
    found: dict[str, tuple[Layout, str, Shape]] = {}
    for tensor, shape in whole.items():
        module, what = module_and_tensor(tensor)
        is_module = what == "weight" and module != tensor and module not in modules
        layout: Layout = "embedding" if is_module else "linear" if what == "bias" else "tensor"
        found[tensor.replace(".", "/")] = (layout, module if is_module else tensor, shape)
    return found


def path_of(module: str, layout: Layout) -> str:
    """Return the path that the weight of a module has in a tree of its own names."""
    leaf = "embedding" if layout == "embedding" else "kernel"
    return f"{module.replace('.', '/')}/{leaf}"


def pair(paths: Mapping[str, str], layout: Layout) -> Given:
    """Return the pair of names for modules and their paths, which finds each at once."""
    modules: dict[str, list[str]] = {}
    for module, path in paths.items():
        modules.setdefault(path, []).append(module)
    return (paths.get, lambda path: modules.get(path, ()), layout)


def _untold(folder: Folder, what: str) -> str:
    return (
        f"{folder.where} does not tell {what}: names and the program that it is for are needed, "
        "see jaxlora.formats.peft.load"
    )


def _weight(folder: Folder, own: Tensors) -> tuple[Layout, Shape]:
    """Return the layout of a module's weight, and its shape in a tree."""
    if projections.are_of(own):
        raise ValueError(_untold(folder, f"how wide the module of {next(iter(own.values()))!r} is"))
    layout, shape = weight(folder, own)
    return ("transposed" if layout == "linear" and folder.config.is_transposed else layout), shape


def weight(source: Source, own: Tensors) -> tuple[Layout, Shape]:
    """Return the layout of a module's weight as its tensors tell it, and its shape in a tree."""
    kinds = factors.form(source, own).kinds
    shapes = {kind: source.file.shapes[own[kind]] for kind in kinds}
    for kind, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(
                f"the tensor {own[kind]!r} of {source.where} must have two axes or more: got "
                f"{shape}"
            )
    if "A" in kinds and own["A"].endswith("lora_embedding_A"):
        return "embedding", (shapes["A"][1], shapes["B"][0])
    if "t1" in kinds:  # of LoHa: (rank, rank, *window), (rank, in), (rank, out)
        in_, out, window = shapes["w1_b"][1], shapes["w1_a"][1], shapes["t1"][2:]
    elif "w1_a" in kinds:
        in_, out, window = shapes["w1_b"][1], shapes["w1_a"][0], ()
    else:
        window = shapes["core" if "core" in kinds else "A"][2:]
        in_, out = shapes["A"][1], shapes["B"][0]
    return ("conv" if window else "linear"), (*window, in_, out)


def _site(path: str, layout: Layout, shape: Shape) -> Site:
    *in_, out = range(len(shape))
    kind = Kind.LOOKED_UP if layout == "embedding" else Kind.CONTRACTED
    window = tuple(in_[:-1]) if layout == "conv" else ()
    use = Use(path, "", "", kind, in_=frozenset(in_), out=frozenset({out}), window=window)
    return Site(path, shape, jnp.float32, Roles((), tuple(in_), (out,)), (use,))
