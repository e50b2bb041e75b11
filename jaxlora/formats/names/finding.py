"""Find which name stands for which leaf, where shapes leave one choice."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxlora.formats.layouts import Arrangement, arrangement
from jaxlora.formats.names.groups import LETTERS, Group, groups
from jaxlora.formats.names.mapping import Names, Place
from jaxlora.formats.names.pairs import Layout
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites, check_sites, is_bias
from jaxlora.tracing.recorder import Kind

Pair = tuple[str, str] | tuple[str, str, Layout]


@dataclasses.dataclass(frozen=True)
class _Target:
    """Leaves that one template makes, or the entries of one.

    Attributes:
        group: the leaves by the template of their path.
        place: template of their place.
        counts: how many numbers each of its placeholders stands for.
        shapes: the shape of the tensor in each layout that it can have.
        is_bias: whether it is called a bias.
    """

    group: Group
    place: str
    counts: tuple[int, ...]
    shapes: Mapping[Layout, tuple[int, ...]]
    is_bias: bool

    @property
    def path(self) -> str:
        """Template of their path."""
        return self.group.template

    @property
    def node(self) -> str:
        """What holds them."""
        return self.path.rpartition("/")[0]


def find(
    torch_names: Mapping[str, Sequence[int]],
    sites: Sites,
    *,
    known: Sequence[Pair] = (),
) -> Names:
    """Return the names of the leaves of a tree that the shapes of tensors leave one choice for.

    A tensor fits a leaf that has as many layers, whether a leaf for each or a stack, and its
    shape, as the roles of the leaf's axes tell how it lies. Where several fit, a word decides that
    one pair alone shares, and that is all of a name on one side, as ``query``; and the bias of a
    module is the one beside its weight. Where that leaves two, nothing is guessed. ``print`` shows
    what was found as code: look at it, and keep it.

    Args:
        torch_names: the shape of each tensor by its name in the file.
        sites: where adapters can go in the tree, from `jaxlora.find_sites`.
        known: pairs, as `Names` takes them, that are not to be found; of tensors that are a part
            of a leaf for one, which shapes do not tell.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a tensor fits no leaf, or several; the message has what was found.

    >>> import jax.numpy as jnp, jaxlora
    >>> from jaxlora.formats import names
    >>> def model(params, x):
    ...     for w in params["layers"]:
    ...         x = x + jnp.tanh(x @ w["up"]) @ w["down"]
    ...     return x
    >>> layer = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    >>> sites = jaxlora.find_sites(model, {"layers": [layer, layer]}, jnp.ones((2, 4)))
    >>> sizes = {"fc": (6, 4), "proj": (4, 6)}
    >>> shapes = {f"h.{i}.{p}.weight": size for i in (0, 1) for p, size in sizes.items()}
    >>> print(names.find(shapes, sites))
    Names(
        ("h.{i}.fc", "layers/{i}/up"),
        ("h.{i}.proj", "layers/{i}/down"),
    )
    """
    _check(torch_names, sites, known)
    told = Names(*known).table(sites.shapes)
    named = {name.removesuffix(".weight") for name in told}
    paths = {place.path for place in told.values()}
    open_names = {n: s for n, s in torch_names.items() if n.removesuffix(".weight") not in named}
    tensors = groups(open_names)
    is_told = any(pair[2:] == ("transposed",) for pair in known)
    pairs, choices = _matched(tensors, [*_targets(sites, paths)], is_transposed=is_told)
    found = [_pair(*pair) for pair in sorted(pairs, key=lambda pair: tensors.index(pair[0]))]
    _refuse(tensors, found, choices)
    made = Names(*known, *found)
    _check_made(made, torch_names, sites)
    return made


def _check(torch_names: object, sites: object, known: object) -> None:
    if not checks.is_listing(known):
        raise TypeError(f"known must be pairs, as Names takes them: got {checks.shown(known)}")
    check_sites(sites)
    needed = "torch_names must be the shape of each tensor by name"
    if not isinstance(torch_names, Mapping) or not torch_names:
        raise TypeError(f"{needed}: got {checks.shown(torch_names)}")
    for name, shape in torch_names.items():
        is_shape = isinstance(shape, Sequence) and all(isinstance(size, int) for size in shape)
        if not isinstance(name, str) or not is_shape:
            raise TypeError(f"{needed}: got {checks.shown(shape)} for {checks.shown(name)}")


def _check_made(made: Names, torch_names: Iterable[str], sites: Sites) -> None:
    """Raise if pairs do not make the names that they are for."""
    wanted = {name.removesuffix(".weight") for name in torch_names}
    if wrong := wanted ^ made.table(sites.shapes).keys():
        raise ValueError(
            f"the pairs must make the names of the tensors and no others: they differ in "
            f"{sorted(wrong)[:5]}; give those pairs in known: found were {made}"
        )


def _pair(group: Group, target: _Target, layout: Layout) -> Pair:
    name = group.template.removesuffix(".weight")
    if name == group.template and not name.endswith(".bias") and layout in ("linear", "embedding"):
        return (name, target.place, "tensor")
    return (name, target.place) if layout == "linear" else (name, target.place, layout)


def _targets(sites: Sites, known: Iterable[str]) -> Iterator[_Target]:
    """Yield the leaves that a tensor can be of, as templates."""
    left = {path: shape for path, shape in sites.shapes.items() if path not in {*known}}
    for group in groups(left):
        path = re.sub(r"\{.\}", "0", group.template)
        site = sites.sites.get(path)
        stacks: list[tuple[int, ...]] = [site.roles.stack] if site is not None else [()]
        if site is None and len(group.shape) > 1:  # vectors of a scanned model, along any axis
            stacks += [(axis,) for axis in range(len(group.shape))]
        for stack in stacks:
            pieces = [":"] * ((stack[-1] + 1) if stack else 0)
            for letter, axis in zip(LETTERS[len(group.counts) :], stack, strict=False):
                pieces[axis] = f"{{{letter}}}"
            place = group.template + (f"[{', '.join(pieces)}]" if pieces else "")
            counts = (*group.counts, *(group.shape[axis] for axis in stack))
            shapes = _shapes(sites, path, stack)
            named_bias = site is None and _is_bias(path)
            if not stack or len({*counts}) == len(counts):  # else it is open which is which
                yield _Target(group, place, counts, shapes, named_bias)


def _is_bias(path: str) -> bool:
    return is_bias(path) or path.rpartition("/")[2].endswith("bias")


def _shapes(sites: Sites, path: str, stack: Sequence[int]) -> dict[Layout, tuple[int, ...]]:
    """Return the shape of the tensor of an entry of a leaf, in each layout that it can have."""
    whole = tuple(sites.shapes[path])
    shape = tuple(1 if axis in stack else size for axis, size in enumerate(whole))
    site = sites.sites.get(path)
    if site is None:
        own = tuple(size for axis, size in enumerate(whole) if axis not in stack)
        return {"linear" if len(own) < 2 else "embedding": own}
    uses = {use.kind for use in site.uses}
    has_window = any(use.window for use in site.uses)
    layouts: tuple[Layout, ...] = ("conv",) if has_window else ("linear", "transposed")
    layouts = ("embedding",) if Kind.LOOKED_UP in uses else layouts
    made: dict[Layout, tuple[int, ...]] = {}
    for layout in layouts:
        how = arrangement(sites, Place(path, None, layout), whole)
        assert isinstance(how, Arrangement)
        made[layout] = how.weight_shape(shape)
    return made


def _matched(
    tensors: Sequence[Group], targets: Sequence[_Target], *, is_transposed: bool
) -> tuple[list[tuple[Group, _Target, Layout]], dict[Group, list[_Target]]]:
    """Return the pairs that are sure, and for the other tensors what they may be."""
    layout = "transposed" if is_transposed else _usual(tensors, targets)
    choices = {group: [t for t in targets if _fits(group, t, layout)] for group in tensors}
    pairs: list[tuple[Group, _Target, Layout]] = []
    while sure := _sure(choices, pairs):
        for group, target in sure:
            pairs.append((group, target, _kinds(target, layout)[0]))
            del choices[group]
        taken = {target.path for _, target in sure}
        choices = {g: [t for t in own if t.path not in taken] for g, own in choices.items()}
    return pairs, choices


def _usual(tensors: Sequence[Group], targets: Sequence[_Target]) -> Layout:
    """Return how linear layers lie in the file: as in PyTorch, or if they cannot, as in GPT-2."""

    def misfits(layout: Layout) -> int:
        matrices = [group for group in tensors if len(group.shape) == 2]
        return sum(not any(_fits(group, t, layout) for t in targets) for group in matrices)

    return "transposed" if misfits("transposed") < misfits("linear") else "linear"


def _fits(group: Group, target: _Target, layout: Layout) -> bool:
    if group.counts != target.counts or group.template.endswith(".bias") != target.is_bias:
        return False
    return any(target.shapes[kind] == group.shape for kind in _kinds(target, layout))


def _kinds(target: _Target, layout: Layout) -> list[Layout]:
    """Return the layouts that a leaf can have in a file with linear layers of some layout."""
    return [layout] if layout in target.shapes else [*target.shapes]


def _sure(
    choices: Mapping[Group, list[_Target]], pairs: Sequence[tuple[Group, _Target, Layout]]
) -> list[tuple[Group, _Target]]:
    """Return pairs of which each has no other choice, on either side."""
    rivals = collections.defaultdict(list)
    for group, own in choices.items():
        for target in own:
            rivals[target.path].append(group)
    alone = [
        (group, own[0])
        for group, own in choices.items()
        if len(own) == 1 and rivals[own[0].path] == [group]
    ]
    return alone or _beside(choices, pairs) or _by_words(choices, rivals)


def _beside(
    choices: Mapping[Group, list[_Target]], pairs: Sequence[tuple[Group, _Target, Layout]]
) -> list[tuple[Group, _Target]]:
    """Return biases with the one that stands beside the weight of their module in the tree."""
    owners = {group.template.removesuffix(".weight"): target for group, target, _ in pairs}
    nodes = collections.Counter(target.node for target in owners.values())
    found = []
    for group, own in choices.items():
        owner = owners.get(group.template.removesuffix(".bias"))
        if owner is None or nodes[owner.node] > 1:
            continue
        near = [target for target in own if target.is_bias and target.node == owner.node]
        if len(near) == 1:
            found.append((group, near[0]))
    return found


def _by_words(
    choices: Mapping[Group, list[_Target]], rivals: Mapping[str, list[Group]]
) -> list[tuple[Group, _Target]]:
    """Return pairs that share a word which no rival of either has."""
    found = []
    for group, own in choices.items():
        for target in own:
            one, other = group, target.group
            shared = (one.nodes & other.words) | (one.words & other.nodes)
            others = [t.group.words for t in own if t.path != target.path]
            others += [rival.words for rival in rivals[target.path] if rival is not group]
            if shared - frozenset().union(*others):
                found.append((group, target))
    counts = collections.Counter(id(x) for pair in found for x in pair)
    return [pair for pair in found if all(counts[id(x)] == 1 for x in pair)]


def _refuse(
    tensors: Sequence[Group], found: Sequence[Pair], choices: Mapping[Group, list[_Target]]
) -> None:
    """Raise if a tensor has no place, or may have two."""
    if not choices:
        return
    lines = [
        f"{group.template!r} {group.shape} may be "
        + (", ".join(repr(t.place) for t in own) or "no leaf")
        for group, own in choices.items()
    ]
    more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
    raise ValueError(
        f"shapes leave one choice for {len(found)} of {len(tensors)} kinds of tensors; give the "
        f"others in known: {'; '.join(lines[:8])}{more}; found were {Names(*found)}"
    )
