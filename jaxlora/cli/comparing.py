"""``jaxlora diff``: whether two folders of adapters change their base alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jaxlora.cli import adapters_folder, matrices, output
from jaxlora.cli.matrices import Matrices
from jaxlora.types import Json
from jaxlora.weights.adapters import Adapter, Adapters, Replacement

Row = dict[str, Any]
Term = Adapter | Replacement


def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A folder, or a file of a diffusion model.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same or not.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="The largest relative difference that counts as none.")
    ] = 1e-6,
    as_json: output.AsJson = False,
) -> None:
    """Compare what two folders of adapters add to their weights.

    Products are compared, not factors: adapters of other ranks or alphas may add the same. The
    difference of a weight is the norm of the difference of the products, over the larger of their
    norms. Exit code 1 if a weight differs, or has an adapter in one of the folders alone.

    Example: jaxlora diff run/step_100 run/step_200
    """
    one, two = adapters_folder.read(first), adapters_folder.read(second)
    report = compare(one.adapters, two.adapters, tolerance)
    report = {"a": str(one.path), "b": str(two.path), **report}
    if as_json:
        output.print_json(report)
    else:
        _print(report)
    if report["differs"]:
        raise typer.Exit(1)


def compare(one: Adapters, two: Adapters, tolerance: float) -> Json:
    """Return how two sets of adapters differ, as JSON has it."""
    shared = [path for path in one if path in two]
    rows = [_row(path, one[path], two[path], tolerance) for path in shared]
    alone = {
        "only_a": [path for path in one if path not in two],
        "only_b": [path for path in two if path not in one],
    }
    differs = any(alone.values()) or any(row["differs"] for row in rows)
    return {"differs": differs, "weights": rows, **alone}


def _row(path: str, one: Term, two: Term, tolerance: float) -> Row:
    """Return how two adapters of one path differ."""
    why = _incomparable(one, two)
    difference = None if why else _difference(one, two)
    is_large = difference is None or not difference <= tolerance
    return {
        "path": path,
        "differs": is_large,
        "difference": difference,
        "why": why or ("they are not equal" if is_large else ""),
        "rank": [one.rank, two.rank],
        "alpha": [getattr(term, "alpha", None) for term in (one, two)],
    }


def _incomparable(one: Term, two: Term) -> str:
    """Return why two adapters cannot be compared, empty if they can."""
    if type(one) is not type(two):
        return "one is replaced, the other has factors"
    if one.shape != two.shape:
        return f"they are for weights of shapes {one.shape} and {two.shape}"
    if isinstance(one, Adapter) and isinstance(two, Adapter) and one.roles != two.roles:
        return "they are for weights whose axes have other roles"
    if getattr(one, "rows", None) != getattr(two, "rows", None):
        return "they replace other rows"
    if {*one.trained()} != {*two.trained()}:
        return "one has a magnitude, the other has none"
    if not one.fingerprint.may_equal(two.fingerprint):
        return f"they are for other weights: {one.fingerprint.digest}, {two.fingerprint.digest}"
    if bad := [*matrices.not_finite(one), *matrices.not_finite(two)]:
        return f"{' and '.join(sorted({*bad}))} hold NaN or inf"
    return ""


def _difference(one: Term, two: Term) -> float:
    """Return the relative difference of what two adapters add, or of what replaces a leaf."""
    if _are_equal(one, two):
        return 0.0
    if isinstance(one, Adapter) and isinstance(two, Adapter):
        products = Matrices.from_adapter(one), Matrices.from_adapter(two)
        found = _relative(products[0].minus(products[1]).norm(), *(x.norm() for x in products))
    else:
        found = 0.0
    names = {*one.trained()} - {"a", "b"}
    pairs = [
        [np.asarray(x.trained()[name]).astype(np.float64) for x in (one, two)] for name in names
    ]
    return max(found, *(_relative(_norm(x - y), _norm(x), _norm(y)) for x, y in pairs), 0.0)


def _are_equal(one: Term, two: Term) -> bool:
    """Tell whether two adapters are the same, bit for bit."""
    pairs = zip(one.trained().values(), two.trained().values(), strict=True)
    is_scaled_alike = getattr(one, "scaling", None) == getattr(two, "scaling", None)
    return is_scaled_alike and all(np.array_equal(x, y) for x, y in pairs)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


def _relative(difference: float, *norms: float) -> float:
    return difference / max(norms) if max(norms) else 0.0


def _print(report: Json) -> None:
    differ = sum(row["differs"] for row in report["weights"])
    output.print_table(("path", "rank", "alpha", "difference", ""), [*_cells(report)])
    shared = len(report["weights"])
    alone = len(report["only_a"]) + len(report["only_b"])
    print(f"\n{differ} of {shared} shared weights differ, {alone} are in one folder alone")


def _cells(report: Json) -> Iterator[tuple[str, ...]]:
    for row in report["weights"]:
        rank = _pair(row["rank"])
        alpha = "" if None in row["alpha"] else _pair([f"{alpha:g}" for alpha in row["alpha"]])
        shown = "" if row["difference"] is None else output.number(row["difference"])
        yield (row["path"], rank, alpha, shown, row["why"])
    for name, folder in (("only_a", report["a"]), ("only_b", report["b"])):
        for path in report[name]:
            yield (path, "", "", "", f"only in {folder}")


def _pair(values: list[Any]) -> str:
    one, two = map(str, values)
    return one if one == two else f"{one}, {two}"
