"""Programs of JAX, read and taken apart: what differs between versions of JAX is in `compat`."""
