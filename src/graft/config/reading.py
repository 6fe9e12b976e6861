# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Reads of files from anywhere: JSON of bounded size and depth, regular expressions that match in bounded time, and
torch.save files and other zip archives without running code stored in them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pickle import UnpicklingError
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

from graft.core.errors import CheckpointError, ConfigError, shorten_text

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]  # an object of a JSON file: the code that reads a field checks its type

LARGEST = 2**24  # bytes of a file
LARGEST_HEADER = 100_000_000  # bytes: safetensors reads no longer header
LARGEST_NUMBER = 2**24  # of a size or factor
DEEPEST = 32  # containers inside each other
MOST_CONTAINERS = 2**22  # each takes 60 bytes of memory, and 3 of the file
DIGITS = 300  # of a whole number: more do not fit a float
DTYPES = {"float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64", "uint16",
          "uint32"}  # fmt: skip
LONG = re.compile(rf"[0-9]{{{DIGITS + 1}}}")


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file, or a link to one, to read its bytes. The kind is checked before the file is opened.

    Raises:
        CheckpointError: it is a folder, a pipe or a device: reading one may block, or never end.
        OSError: there is no such file, or it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path} is a folder, pipe or device where a file should be. Put the file there.")
    return open(path, "rb")


def read_object(path: str | os.PathLike[str], largest: int = LARGEST, finite: bool = True) -> Json:
    """Return the object that a JSON file holds.

    Args:
        largest: bytes that the file may have, by default 16 MiB.
        finite: refuse infinite and NaN numbers; False for a model's config, where Mamba2 has a range to Infinity.

    Raises:
        CheckpointError: the file is too large, is no JSON, or holds something else. The text names file and field.
        OSError: there is no such file, or it cannot be read.
    """
    with open_file(path) as f:
        if (size := os.fstat(f.fileno()).st_size) > largest:
            raise CheckpointError(
                f"{path} has {size:,} bytes: a config has at most {largest:,}, so it is none. "
                "Give the folder of an adapter."
            )
        loaded = parse_json(f.read(size), str(path))
    check_value(loaded, str(path), "", 0, finite)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not the fields of an adapter. "
            "Give the adapter_config.json of an adapter."
        )
    return loaded


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text, or of its UTF-8 bytes.

    Whole numbers of more than 300 digits become infinity; NaN and Infinity are accepted.

    Args:
        what: names the text in errors.

    Raises:
        CheckpointError: it is no JSON, has a key twice, is nested too deeply for Python, or has more than 2²² lists and
            objects, which would take gigabytes.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if len(text) > MOST_CONTAINERS and text.count("[") + text.count("{") > MOST_CONTAINERS:
            raise CheckpointError(f"{what} holds more than {MOST_CONTAINERS:,} lists and objects. It is damaged.")
        return json.loads(text, parse_int=parse_int if LONG.search(text) else None, object_pairs_hook=make_object)
    except RecursionError as e:
        raise CheckpointError(
            f"{what} nests lists and objects more than {DEEPEST} deep: no adapter does. Save or download it again."
        ) from e
    except ValueError as e:  # of JSON or UTF-8
        raise CheckpointError(
            f"{what} is not valid JSON ({e}): it is truncated or was edited by hand. Save or download it again."
        ) from e


def parse_int(digits: str) -> float:
    """Return a whole number from its digits; infinity for more than 300 digits, so that `check_value` can name the
    field.
    """
    return int(digits) if len(digits) <= DIGITS else math.inf


def make_object(pairs: list[tuple[str, object]]) -> Json:
    """Return (key, value) pairs as a dict. Raises ValueError with the key if one is there twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return out


def check_value(value: object, what: str, field: str, depth: int, finite: bool = True) -> None:
    """Raise CheckpointError for a number that is infinite or NaN (if `finite`), and for containers nested deeper than
    `DEEPEST` (32). Only floats, lists and dicts are looked at, at any depth, within containers those of the exact type;
    keys are not.

    Args:
        what: names the file in errors.
        field: the key of the outermost object that the value is in; if "", the first key or index takes its place.
        depth: number of containers around the value.
    """
    if isinstance(value, float):
        if finite and not math.isfinite(value):
            raise CheckpointError(
                f"{what}: the field '{field}' has a number that is too large, infinite or NaN. "
                "Write a finite number there."
            )
    elif isinstance(value, (dict, list)):
        if depth >= DEEPEST:
            raise CheckpointError(
                f"{what}: the field '{field}' nests lists and objects more than {DEEPEST} deep. "
                "Flatten it, or leave it out."
            )
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if type(inner) in (float, list, dict):
                check_value(inner, what, field or str(key), depth + 1, finite)


LONGEST = 100_000  # characters of a pattern
MOST_REPEATS = 10_000  # product of the counts in {…}; a compiled pattern may grow with it
QUICK_REPEATS = 2  # so many repetitions, none inside another, take a time that is quadratic in the text
SLOW = 0.001  # seconds; a match on a module's path takes some microseconds
BUDGET = 1.0  # seconds that all slow matches of one pattern may take together


class Pattern:
    """A regular expression in a config's field, with Python's syntax; `match`, `fullmatch` and `subn` are those of
    `re`.

    A pattern with many or nested repetitions is matched by the package `regex`, with a time limit: all its slow matches
    together may take `BUDGET` seconds. A match beyond that raises ConfigError.

    Args:
        text: the pattern as the field has it, for errors.
        field: name of the field, for errors.
        whole: the pattern to match; None: `text`.

    Raises:
        ConfigError: it is no regular expression, or too large.
    """

    __slots__ = ("field", "fullmatch", "left", "match", "subn", "text")

    def __init__(self, text: str, field: str, whole: str | None = None):
        """Compile the pattern, by `re` if it is quick (`is_quick`), else by the package `regex`, with a limit of 1 s
        for all its slow matches.

        Raises:
            ConfigError: it is no regular expression, `regex` is needed and missing, it has more than 100,000
                characters, or counts in braces with a product above 10,000.
        """
        self.text, self.field, self.left = text, field, BUDGET
        whole = text if whole is None else whole
        bare = remove_escapes(text)
        if len(text) > LONGEST or math.prod(repeat_counts(bare)) > MOST_REPEATS:
            raise self._error("is too large for a regular expression of names. Use a list of names.")
        try:
            plain = re.compile(whole)
            if is_quick(bare):
                self.match, self.fullmatch, self.subn = plain.match, plain.fullmatch, plain.subn
                return
            import regex  # not needed to import graft

            timed = regex.compile(whole)
        except ImportError as e:
            why = "needs the package regex, which limits the time of slow patterns. Run pip install regex."
            raise self._error(why) from e
        except Exception as e:  # of many types: nesting, counts, syntax
            why = f"is not a regular expression: {e or type(e).__name__}. Give a list to name modules plainly."
            raise self._error(why) from e
        functions = (timed.match, timed.fullmatch, timed.subn)
        self.match, self.fullmatch, self.subn = (partial(self._call_in_time, function) for function in functions)

    def _error(self, why: str) -> ConfigError:
        """Return the error for the pattern: its shortened text and its field, then `why`."""
        return ConfigError(f"{shorten_text(repr(self.text))} of {self.field} {why}")

    def _call_in_time(self, function: Callable[..., object], *args: object) -> Any:
        """Call a function of `regex` within the time that is left for this pattern, but at least 1 ms.

        Return its result. The time of a call slower than 1 ms is subtracted from `left`, which may become negative.

        Raises:
            ConfigError: it takes longer, from the TimeoutError. `left` becomes 0, so that all later slow matches of the
                pattern fail as well.
        """
        start = perf_counter()
        try:
            result = function(*args, timeout=max(self.left, SLOW))
        except TimeoutError as e:
            self.left = 0.0
            raise self._error(
                f"takes too long to match '{args[-1]}': it has repetitions inside repetitions, such as (a+)+. "
                "Write it without, or give a list of names."
            ) from e
        seconds = perf_counter() - start
        if seconds > SLOW:
            self.left -= seconds
        return result


@lru_cache(maxsize=4096)
def compile_pattern(text: str, field: str, whole: str | None = None) -> Pattern:
    """Return the `Pattern` of a config's field, which matches `whole` in place of `text` if it is given.

    The last 4,096 are cached. Raises ConfigError for an invalid pattern.
    """
    return Pattern(text, field, whole)


def compile_ending(text: str, field: str) -> Pattern:
    """Return a pattern that matches a path if `text` matches its end, from the path's start or after a dot.

    The result is cached and has a time limit; a pattern that is too large raises ConfigError as well.
    """
    return compile_pattern(text, field, rf"(.*\.)?({text})$")


def remove_escapes(text: str) -> str:
    """Return a pattern without escaped characters, and with "(" in place of "(?", which names a kind of group."""
    return re.sub(r"\(\?", "(", re.sub(r"\\.", "", text, flags=re.DOTALL))


def repeat_counts(bare: str) -> list[int]:
    """Return the numbers in braces ("{2,5}") of a pattern, the first 9 digits of each; 1 for 0."""
    return [int(n[:9]) or 1 for braces in re.findall(r"\{[\d,\s]*\}", bare) for n in re.findall(r"[0-9]+", braces)]


def is_quick(bare: str) -> bool:
    """Return True if a pattern, without escapes, has at most two repetitions (*, +, ? or {) and none of *, + and {
    comes after a group.
    """
    repeats = re.findall(r"[*+?{]", bare)
    return len(repeats) <= QUICK_REPEATS and not re.search(r"\)[*+{]", bare)


# archives


def load_torch_file(f: IO[bytes], path: str) -> object:
    """Return the object in an open torch.save file, on the CPU, with `weights_only=True`: no pickled code runs.

    Args:
        path: name of the file in errors.

    Raises:
        CheckpointError: it holds other objects than tensors, dicts and lists, is damaged, or would grow when unpacked
            (`check_archive`).
        Warning: torch warned, and the program turns warnings into errors.
    """
    import torch

    try:
        check_archive(f)
        f.seek(0)
        return torch.load(f, map_location="cpu", weights_only=True)
    except UnpicklingError as e:  # torch's text explains how to run the code, so it is left out
        match = re.search(r"WeightsUnpickler error: *\n?(.*?)(\. |\n|$)", str(e))
        at = f" ({match[1].strip()})" if match and match[1].strip() else ""
        raise CheckpointError(
            f"{path} holds other objects than tensors{at}, and nothing of it has been run. "
            "Ask its author for a safetensors file."
        ) from e
    except Warning:  # torch warns, and this program turns warnings into errors
        raise
    except Exception as e:
        raise CheckpointError(
            f"{path} cannot be read as tensors ({e}): it is damaged, or holds other objects. Save or download it again."
        ) from e


def read_weights(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, as they are, of any dtype and layout: of safetensors if the path ends in
    ".safetensors", else of torch.save, on the CPU.

    Args:
        what: begins each error, such as "The state".

    Raises:
        CheckpointError: the file cannot be read as tensors, for any Exception, or holds anything but a dict of tensors.
        FileNotFoundError: there is no such file. A broken link counts as damaged.
    """
    from torch import Tensor

    path = os.fspath(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{what}: there is no file '{path}'.")
    try:
        with open_file(path) as f:
            if path.endswith(".safetensors"):
                from safetensors.torch import load

                tensors: object = load(f.read())
            else:
                tensors = load_torch_file(f, path)
    except Exception as e:  # damaged files raise errors of many types
        raise CheckpointError(f"{what} '{path}' cannot be read as tensors ({e}). Give another file.") from e
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{what} '{path}' does not hold tensors by name. Give another file.")
    return tensors


def check_tensors_by_name(content: object, path: str) -> dict[str, Tensor]:
    """Return a new dict of `content` if it is a mapping of string names to tensors, possibly empty; else raise
    CheckpointError, which names the file at `path`.
    """
    from torch import Tensor

    if isinstance(content, Mapping) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()):
        return dict(content)
    raise CheckpointError(f"{path} does not hold a dict of tensors by name. Pass an adapter's weights.")


def describe_fault(t: Tensor) -> str | None:
    """Return why a tensor cannot be loaded into an adapter, as a predicate such as "is sparse or nested"; None if it
    can.

    The first fault counts:

    - A dtype that is not known: "is quantized", or the dtype's name. All float8 dtypes are known.
    - A layout that is not strided, or a nested tensor.
    - The meta device.
    - A tensor that repeats its numbers: its memory is smaller than they are, and it is not contiguous.
    """
    from torch import strided

    if (name := str(t.dtype).removeprefix("torch.")) not in DTYPES and not name.startswith("float8_"):
        return "is quantized" if t.is_quantized else f"has dtype {t.dtype}"
    if t.layout is not strided or t.is_nested:
        return "is sparse or nested"
    if t.is_meta:
        return "is on the meta device, without values"
    repeats = not t.is_contiguous() and t.numel() * t.itemsize > t.untyped_storage().nbytes()
    return "repeats its numbers" if repeats else None


def read_record(f: IO[bytes], end: str, most: int) -> bytes | None:
    """Return the first `most` bytes of the first file in a zip archive with a name that ends in `end`.

    Return None if no name ends so, or if `f` is no archive or a damaged one. No error is raised: reading the tensors
    reports damage.
    """
    try:
        with ZipFile(f) as archive:
            name = next((n for n in archive.namelist() if n.endswith(end)), None)
            if name is None:
                return None
            with archive.open(name) as record:
                return record.read(most)
    except Exception:  # zipfile and its decompressors raise errors of many types
        return None


def check_archive(file: IO[bytes]) -> None:
    """Raise ValueError if the files in a zip archive have more bytes, unpacked, than the archive itself.

    torch does not compress, so only a manipulated file grows. A file that is no zip archive passes. The position in
    `file` is not restored.
    """
    if not is_zipfile(file):
        return
    with ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it would become {size:,} bytes, more than it has")
