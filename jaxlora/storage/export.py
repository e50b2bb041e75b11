"""Let `jax.export` write functions that take adapted weights: the static parts of nodes as JSON."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export

from jaxlora.weights.adapters import Adapter, Replacement
from jaxlora.weights.fingerprints import Fingerprint
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf
from jaxlora.weights.quantized import Code, QuantizedWeight
from jaxlora.weights.roles import Roles


def _fields(kind: type, *, static: bool) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if bool(f.metadata.get("static")) == static]


def _written(values: Iterable[object]) -> bytes:
    """Return the static fields of a node, in order."""
    return json.dumps(list(values), default=_plain).encode()


def _plain(value: Any) -> object:
    if isinstance(value, Fingerprint):  # unknown: what is exported is called for any base
        return None
    return str(value) if isinstance(value, np.dtype) else dataclasses.asdict(value)


def _read(data: bytes) -> tuple[Any, ...]:
    return _tuples(json.loads(data))


def _read_adapter(data: bytes) -> tuple[Any, ...]:
    roles, alpha, shape, _, *others = _read(data)
    return Roles(**roles), alpha, shape, Fingerprint(), *others


def _read_replacement(data: bytes) -> tuple[Any, ...]:
    shape, _, rows = _read(data)
    return shape, Fingerprint(), rows


def _tuples(value: Any) -> Any:
    """Return what JSON gives with tuples for its lists."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _register(kind: type, read: Any) -> None:
    static, arrays = _fields(kind, static=True), _fields(kind, static=False)

    def build(aux_data, children):
        fields = dict(zip(static, aux_data, strict=True)) | dict(zip(arrays, children, strict=True))
        return kind(**fields)

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jaxlora.{kind.__name__}",
        serialize_auxdata=_written,
        deserialize_auxdata=read,
        from_children=build,
    )


def _read_quantized(data: bytes) -> tuple[Any, ...]:
    code, dtype, is_packed = _read(data)
    return Code(*code), jnp.dtype(dtype), is_packed


_register(LoRAWeight, _read)
_register(QuantizedWeight, _read_quantized)
_register(Adapter, _read_adapter)
_register(Replacement, _read_replacement)
_register(TrainedLeaf, _read)
