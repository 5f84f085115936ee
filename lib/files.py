"""Files: atomic writes, JSON and JSONL, errors that name the file and the line."""
import contextlib
import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path

from safetensors import SafetensorError

from lib.args import InputError, require
from lib.dist import RANK, is_peer_failure

MAX_LINE = 2**26   # characters; a compressed file of a megabyte could hold a line of a gigabyte
MAX_ARRAY = 2**30  # characters of a JSON array, which is read at once

# ---------------------------------------------------------------------------------------------
# reading

@contextlib.contextmanager
def open_text(path: str | Path):
    """Open a UTF-8 text file, which may end in .gz and may begin with a byte-order mark. Raises
    InputError if it cannot be read, here or in the `with` block."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_jsonl(path: str | Path):
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz, without its blank lines. A file
    that holds one JSON array gives (number of the item from 1, item).

    Raises InputError with file and line for anything but one JSON object per line, for a line of
    more than MAX_LINE characters, and for an array of more than MAX_ARRAY."""
    with open_text(path) as file:
        if is_array(file.buffer):
            text = file.read(MAX_ARRAY + 1)
            require(len(text) <= MAX_ARRAY, f"{path}: an array of more than {MAX_ARRAY:,} "
                    "characters: write one object per line instead, as `jq -c .[]` does")
            for number, item in enumerate(parse_json(text, path, 1), start=1):
                yield number, as_row(item, path, number)
            return
        for number, line in bounded_lines(file, path):
            yield number, as_row(parse_json(line, path, number), path, number)


def is_array(binary) -> bool:
    """Return whether an open file holds a JSON array, and go back to its start."""
    start = binary.read(1000)
    binary.seek(0)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def bounded_lines(file, path, blank=False):
    """Yield (number, line) of a file that is open for text or bytes; blank: with blank lines."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        require(len(line) <= MAX_LINE,
                f"{path}:{number}: a line of more than {MAX_LINE:,} characters")
        if blank or line.strip():
            yield number, line


def as_row(value, path, number: int) -> dict:
    """Return what a line of a file holds if it is an object, and raise InputError if it is not."""
    require(isinstance(value, dict), f"{path}:{number}: each line must be a JSON object")
    return value


def parse_json(text: str | bytes, path, number: int):
    """Parse what begins at this line of a file. Raises InputError with file and line."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise InputError(f"{path}:{line}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, endless digits, or endless nesting
        raise InputError(f"{path}:{number}: cannot be read ({error})") from None


@contextlib.contextmanager
def at_line(path, number: int):
    """Say which line of a file an error is about."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # an InputError is a ValueError
        raise InputError(f"{path}:{number}: {' '.join(str(error).split())}") from None


class JsonlFile:
    """The rows of a JSONL file, any of which can be read again: `read` takes the place in the file
    that `rows` gave.

    A .gz would be read from its start each time, and an array has no lines: both are copied to a
    temporary file."""

    def __init__(self, path: str | Path):
        self.path = path
        with open_text(path) as file:
            is_plain = Path(path).suffix.lower() != ".gz" and not is_array(file.buffer)
        self.file = open(path, "rb") if is_plain else self.copy()

    def copy(self):
        line = 1
        with disk_errors(tempfile.gettempdir()):
            copy = tempfile.TemporaryFile()
            for number, row in read_jsonl(self.path):
                copy.write(b"\n" * (number - line) + json.dumps(row).encode())
                line = number
            copy.seek(0)
        return copy

    def rows(self):
        """Yield (line number, place, object), with the errors of read_jsonl."""
        for number, line in bounded_lines(self.file, self.path):
            place = self.file.tell() - len(line)
            yield number, place, as_row(parse_json(line, self.path, number), self.path, number)

    def read(self, place: int) -> dict:
        self.file.seek(place)
        return json.loads(self.file.readline())


def read_texts(*paths):
    """Yield the documents of text files. Lines that read <|endoftext|> separate them; without such
    a line a file is one document. Raises InputError."""
    for path in paths:
        lines = []
        with open_text(path) as file:
            for _, line in bounded_lines(file, path, blank=True):
                if line.rstrip() != "<|endoftext|>":
                    lines.append(line)
                    continue
                yield "".join(lines)
                lines = []
        yield "".join(lines)


def read_json(path: str | Path, missing_ok: bool = False) -> dict:
    """Return the JSON object of a file, or with missing_ok {} if there is no such file. Raises
    InputError for anything else."""
    if missing_ok and not Path(path).exists():
        return {}
    with open_text(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: must be a JSON object")
    return value


# ---------------------------------------------------------------------------------------------
# writing

@contextlib.contextmanager
def disk_errors(path):
    """Report a failed write, as on a full disk, in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's, safetensors'
        if is_peer_failure(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        for cause in (error.__context__, error):
            if isinstance(cause, OSError):
                reason = cause.strerror or str(cause)
        raise InputError(f"{path}: cannot be written ({reason}); what was there is still there"
                         ) from None


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Give a temporary path to write to, then rename it: readers see the old file or the new one.
    Two processes must not write one path at a time.

    We create the temporary file ourselves: with O_EXCL a link that somebody has put there is never
    followed. fsync makes the promise hold when the machine crashes too. Without it, the rename may
    reach the disk before the bytes do, and leave an empty file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed run
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            mask = os.umask(0)  # can only be read by setting it
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # safetensors lets only the owner read its files
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # what a failed write left


def write_atomic(path: str | Path, content: str) -> None:
    """Write a text file in one step. All processes call this with the same content."""
    if RANK == 0:
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def write_jsonl(path: str | Path, rows) -> None:
    """Write one JSON object per line. Half of a surrogate pair, which UTF-8 cannot hold, becomes
    JSON's escape for it, such as \\ud83d."""
    if RANK > 0:
        return
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8",
                                              errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_safe(x):
    """Return x with null for nan and infinity, which JSON does not have."""
    return json.loads(json.dumps(x), parse_constant=lambda name: None)
