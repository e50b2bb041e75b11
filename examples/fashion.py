"""Fashion-MNIST: pictures of clothes in ten classes."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fetch
import numpy as np


class Images(NamedTuple):
    """Images ``(n, size, size, 3)`` from 0 to 255 and labels ``(n,)``."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, rows: Any) -> "Images":
        """Return some images."""
        return Images(*(field[rows] for field in self))


def read_images(
    seed: int, train: int = 4000, held_out: int = 2000, enlarged: int = 2
) -> tuple[Images, Images]:
    """Return images of the official training and test sets, shuffled.

    Args:
        seed: decides which, and their order.
        train: number to train on, up to 60,000.
        held_out: number held out, up to 10,000.
        enlarged: pixels of the result for each of the 28 of a side.
    """
    paths, rng = fetch.fashion(), np.random.default_rng(seed)
    sets = []
    for count, (images, labels) in zip((train, held_out), (paths[:2], paths[2:]), strict=True):
        found = Images(_read(images, 16).reshape(-1, 28, 28), _read(labels, 8).astype(np.int32))
        found = found.take(rng.permutation(len(found.labels))[:count])
        large = found.images.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
        sets.append(found._replace(images=np.repeat(large[..., None], 3, axis=-1)))
    return sets[0], sets[1]


def training_batches(data: Images, size: int, seed: int) -> Iterator[Images]:
    """Yield batches without end, in random order."""
    if len(data.labels) < size:
        raise ValueError(f"too few images for a batch: {size} needed, got {len(data.labels)}")
    rng = np.random.default_rng(seed)
    while True:
        shuffled = rng.permutation(len(data.labels))
        for start in range(0, len(shuffled) - size + 1, size):
            yield data.take(shuffled[start : start + size])


def _read(path: Path, header: int) -> np.ndarray:
    """Return the bytes of an IDX file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
