"""``jaxlora inspect``: what a folder or a file of adapters holds."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import typer

from jaxlora.cli import adapters_folder, matrices, output
from jaxlora.cli.adapters_folder import AdaptersFolder
from jaxlora.cli.matrices import Matrices
from jaxlora.formats.diffusion.metadata import METADATA
from jaxlora.types import Json
from jaxlora.weights.adapters import Adapter, Replacement

Row = dict[str, Any]


def inspect(
    folder: adapters_folder.Given,
    as_json: output.AsJson = False,
) -> None:
    """Show what a folder of adapters holds, and for what base it is.

    For each weight: its shape, rank and alpha, the norms of the product and of the factors, and
    how many directions are dead, which add nothing. Exit code 1 if anything holds NaN or inf.

    Example: jaxlora inspect run
    """
    found = adapters_folder.read(folder)
    report = describe(found)
    if as_json:
        output.print_json(report)
    else:
        _print(report)
    if report["not_finite"]:
        raise typer.Exit(1)


def describe(folder: AdaptersFolder) -> Json:
    """Return what is said of a folder, as JSON has it."""
    rows = [*map(_row, folder.adapters, folder.adapters.values())]
    return {
        "folder": str(folder.path),
        "kind": folder.kind,
        "form": _form(folder),
        "version": folder.about.get("jaxlora" if folder.kind == "jaxlora" else "peft_version"),
        "base": _base(folder),
        "adapters": [row for row in rows if "rank" in row],
        "replaced": [row for row in rows if "rank" not in row],
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_on_disk": folder.bytes_on_disk,
        "not_finite": [row["path"] for row in rows if row["not_finite"]],
    }


def _row(path: str, term: Adapter | Replacement) -> Row:
    """Return what is said of one adapter, or of a leaf that is replaced."""
    arrays = {name: np.asarray(x).astype(np.float64) for name, x in term.trained().items()}
    row: Row = {
        "path": path,
        "shape": [*term.shape],
        "parameters": sum(array.size for array in arrays.values()),
        "bytes": sum(array.nbytes for array in term.trained().values()),
        "not_finite": matrices.not_finite(term),
        "base": term.fingerprint.digest,
        **{f"norm_{name}": float(np.linalg.norm(array)) for name, array in arrays.items()},
    }
    if isinstance(term, Replacement):
        return row | {"rows": None if term.rows is None else [*term.rows]}
    product = Matrices.from_adapter(term)
    return row | {
        "stack": [*term.roles.stack],
        "in": [*term.roles.in_],
        "out": [*term.roles.out],
        "rank": term.rank,
        "alpha": term.alpha,
        "scaling": term.scaling,
        "norm": math.nan if row["not_finite"] else product.norm(),
        "dead": product.dead(),
        "directions": len(product.a) * term.rank,
        "changed": term.changed,
    }


def _form(folder: AdaptersFolder) -> str:
    """Return in which of its forms the writer of a folder has written it."""
    if folder.kind == "jaxlora":
        return f"jaxlora, format {folder.about['format_version']}"
    if folder.kind == "peft":
        return f"PEFT, {folder.about['peft_type']}"
    made_by = "diffusers" if METADATA in folder.about else folder.about.get("ss_network_module")
    return "a diffusion model" + (f", by {made_by}" if made_by else "")


def _base(folder: AdaptersFolder) -> Json:
    """Return what a folder tells of the base."""
    prints = [term.fingerprint for term in folder.adapters.values()]
    return {
        "name": folder.base_name,
        "dtypes": sorted({known.dtype for known in prints if known.dtype}),
        "known_weights": sum(known.digest is not None for known in prints),
        "weights": len(prints),
    }


def _print(report: Json) -> None:
    print(f"{report['folder']}: adapters of {report['form']}")
    print(f"base: {_said_of_base(report)}\n")
    columns = ("path", "shape", "rank", "alpha", "norm", "norm of a", "norm of b", "dead", "")
    output.print_table(columns, [*_cells(report)])
    print(f"\n{report['parameters']:,} parameters, {report['bytes']:,} bytes")
    if report["not_finite"]:
        print(f"NaN or inf in {len(report['not_finite'])} of them")


def _said_of_base(report: Json) -> str:
    base = report["base"]
    if report["kind"] != "jaxlora":
        said = "the config" if report["kind"] == "peft" else "the header"
        return base["name"] or f"{said} names none"
    known = f"the values of {base['known_weights']} of {base['weights']} weights are known by hash"
    return f"{', '.join(base['dtypes']) or 'of unknown dtype'}; {known}"


def _cells(report: Json) -> Iterator[tuple[str, ...]]:
    for row in report["adapters"]:
        dead = f"{row['dead']} of {row['directions']}" if row["dead"] else ""
        norms = (output.number(row[name]) for name in ("norm", "norm_a", "norm_b"))
        notes = [f"{' and '.join(row['not_finite'])} not finite"] if row["not_finite"] else []
        notes += ["with magnitude"] if "norm_magnitude" in row else []
        notes += [f"the base was changed by {row['changed']}"] if row["changed"] else []
        first = (row["path"], output.shape(row["shape"]), str(row["rank"]))
        yield (*first, f"{row['alpha']:g}", *norms, dead, ", ".join(notes))
    for row in report["replaced"]:
        rows = "replaced" if row["rows"] is None else f"{len(row['rows'])} rows replaced"
        note = f"{rows}, not finite" if row["not_finite"] else rows
        norm = output.number(row["norm_value"])
        yield (row["path"], output.shape(row["shape"]), "", "", norm, "", "", "", note)
