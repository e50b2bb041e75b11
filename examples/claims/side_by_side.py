"""Runs made by several processes side by side, each on its share of the cores.

A small model's step on one core takes hardly longer than on two, so two processes of one core make
nearly twice as many runs in the same time.
"""

import functools
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from .lab import Lab, Wanted


def make(lab: Lab, wanted: Iterable[Wanted], processes: int) -> None:
    """Make all runs that are wanted, and leave them in the folder of the lab.

    Args:
        lab: where the runs belong.
        wanted: what to make, those that take longest first.
        processes: how many at once; the cores are dealt out among them, where the system can.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    context = multiprocessing.get_context("spawn")
    shares = context.Queue()
    for i in range(processes):
        shares.put(cores[i::processes] or cores)
    os.environ["TQDM_DISABLE"] = "1"  # of the processes that are started; here it was read
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # large buffers: 20 % faster
    with ProcessPoolExecutor(processes, context, _take_share, (shares,)) as pool:
        made = [
            pool.submit(_runs, lab.folder, lab.seeds, lab.quick, each)
            for each in dict.fromkeys(wanted)
        ]
        for each in tqdm(as_completed(made), desc="training", total=len(made), leave=False):
            each.result()


def _take_share(shares: "multiprocessing.Queue[list[int]]") -> None:
    """Keep this process to some of the cores, before JAX counts them."""
    if cores := shares.get():
        os.sched_setaffinity(0, cores)


def _runs(folder: Path, seeds: tuple[int, ...], quick: bool, wanted: Wanted) -> None:
    """Make what is wanted, in a process of its own."""
    _lab(folder, seeds, quick).runs(wanted)


@functools.cache
def _lab(folder: Path, seeds: tuple[int, ...], quick: bool) -> Lab:
    return Lab(folder, seeds, quick=quick)
