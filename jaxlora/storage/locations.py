"""What a path to a checkpoint means: a directory of this machine, or one in a bucket.

``~`` is the user's home, and a symbolic link stands for what it points to, so that what is
replaced is the directory and not the link. ``gs://`` is a bucket of Google Cloud Storage, which
Orbax reads and writes itself, through `etils.epath`.
"""

import concurrent.futures
import os
import re
import threading
from pathlib import Path
from typing import Any

from jaxlora.messages.checks import shown
from jaxlora.types import Function

PathLike = str | os.PathLike[str]
Place = Any  # a pathlib.Path, or an etils.epath.Path for a bucket
_PATIENCE = 20.0  # seconds for a bucket to answer


def resolve(path: PathLike) -> Place:
    """Return where a path leads, or raise if nothing can be read or written there.

    Args:
        path: as the user gave it.

    Returns:
        An absolute `pathlib.Path` without symbolic links, or an `etils.epath.Path` in a bucket.

    Raises:
        TypeError: it is no string and no path.
        ValueError: it is empty, or an address that Orbax does not write to.
        ImportError: it is in a bucket, and the package that reaches it is not installed.
        OSError: it is in a bucket that does not exist or does not answer.
    """
    text = path if isinstance(path, str) else getattr(path, "__fspath__", lambda: None)()
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of one: got {shown(path)}")
    if not text:
        raise ValueError("path is empty: the path of a directory is needed")
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)", text):
        scheme, slash = found.groups()
        if not slash:
            raise ValueError(
                f"{text!r} is the address of a bucket with one slash too few, as pathlib.Path "
                f"leaves it: pass it as a string, {scheme}://{text[found.end() :]}"
            )
        if scheme != "gs":
            raise ValueError(
                f"{text!r} is in no place that Orbax writes to: a local path or the address of a "
                f"bucket of Google Cloud Storage, gs://..., is needed: got {scheme}://"
            )
        return _in_bucket(text)
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError(f"{text!r} is in the home directory of a user that there is not")
    return Path(os.path.realpath(os.path.expanduser(text)))


def is_local(place: Place) -> bool:
    """Tell whether a resolved path is on a file system, where directories can be renamed."""
    return isinstance(place, Path)


def _in_bucket(text: str) -> Place:
    """Return the path in a bucket that exists and answers, or raise."""
    from etils import epath

    place = epath.Path(text)
    if len(place.parts) < 4:  # "/", "gs", the bucket, a name in it
        raise ValueError(f"{text!r} is a whole bucket: the path of a directory in it is needed")
    bucket = epath.Path("gs://" + place.parts[2])
    try:
        is_there = _answer_of(bucket.exists)
    except ImportError as error:
        raise ImportError(
            f"{text} is in a bucket of Google Cloud Storage, and what reaches it is not installed: "
            "pip install gcsfs"
        ) from error
    except TimeoutError as error:
        raise TimeoutError(f"{text} does not answer within {_PATIENCE:g} s") from error
    except Exception as error:  # of gcsfs, aiohttp, google.auth or TensorFlow
        raise OSError(f"{text} cannot be reached: {error}") from error
    if not is_there:
        raise FileNotFoundError(f"{text} cannot be reached: there is no bucket {bucket}")
    return place


def _answer_of(question: Function) -> object:
    """Return what a function returns, or raise if it takes too long: some retry for minutes."""
    answer: concurrent.futures.Future = concurrent.futures.Future()

    def ask():
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(timeout=_PATIENCE)
