"""Files: atomic writes, JSON and JSONL, errors that name the file and the line."""
import contextlib
import gzip
import json
import os
import zlib
from pathlib import Path

from safetensors import SafetensorError

from lib.args import InputError, require
from lib.dist import RANK, is_peer_failure

# ---------------------------------------------------------------------------------------------
# reading

def open_text(path: str | Path):
    """Open a UTF-8 text file, which may end in .gz. Raises InputError."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        return open_file(path, "rt", encoding="utf-8-sig")  # with or without a byte-order mark
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_jsonl(path: str | Path):
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz, without its blank lines.

    Raises InputError with file and line for anything but one JSON object per line."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    require(isinstance(row, dict),
                            f"{path}:{number}: each line must be a JSON object")
                    yield number, row
        except InputError:
            raise
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}"
            raise InputError(f"{path}:{number}: not JSON ({where})") from None
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        except (ValueError, RecursionError) as error:  # endless digits, or endless nesting
            raise InputError(f"{path}:{number}: cannot be read ({error})") from None


def read_json(path: str | Path) -> dict:
    """Return the JSON object of a file. Raises InputError for anything else."""
    with open_text(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError, OSError) as error:
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
        reason = str(error).splitlines()[0]
        for cause in (error.__context__, error):
            if isinstance(cause, OSError):
                reason = cause.strerror or str(cause)
        raise InputError(f"{path}: cannot be written ({reason}); what was there is still there"
                         ) from None


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Give a temporary path to write to, then rename it: readers see the old file or the new one.

    fsync makes this hold when the machine crashes too. Without it, the rename may reach the disk
    before the bytes do, and leave an empty file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """Write one JSON object per line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines))


def json_safe(x):
    """Return x with null for nan and infinity, which JSON does not have."""
    return json.loads(json.dumps(x), parse_constant=lambda name: None)
