"""Files: atomic writes, JSONL, errors with file and line."""
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
# files

def open_text(path: str | Path):
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    try:
        return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_jsonl(path: str | Path):
    """Yields (line number from 1, object) of a .jsonl or .jsonl.gz; blank lines are skipped."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    require(isinstance(row, dict), f"{path}:{number}: want a JSON object a line")
                    yield number, row
        except InputError:
            raise
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}"
            raise InputError(f"{path}:{number}: not JSON ({where})") from None
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        except (ValueError, RecursionError) as error:  # a number, or nesting, without end
            raise InputError(f"{path}:{number}: cannot be read ({error})") from None


def read_json(path: str | Path) -> dict:
    with open_text(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError, OSError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: want a JSON object")
    return value


@contextlib.contextmanager
def disk_errors(path):
    """A disk that is full or cannot be written to is told in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's, safetensors'
        if is_peer_failure(error):
            raise
        known = [e.strerror or str(e) for e in (error, error.__context__) if isinstance(e, OSError)]
        reason = (known or str(error).splitlines())[0]
        raise InputError(f"{path}: cannot be written ({reason}); what was there is still there"
                         ) from None


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Gives a temporary name to write under, then renames: a reader sees the old file or the new
    one. After a crash of the machine too, by fsync: else the rename may reach the disk before the
    bytes do, and leave an empty file. So no older copy is kept beside it (R4.4)."""
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
            os.chmod(temporary, 0o666 & ~mask)  # safetensors' own files are for their owner only
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half of a file, on a disk that is full


def write_atomic(path: str | Path, content: str) -> None:
    if RANK == 0:  # all processes come here with the same content
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def json_safe(x):
    """For JSON, which has no nan and no infinity: null."""
    return json.loads(json.dumps(x), parse_constant=lambda name: None)


def write_jsonl(path: str | Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
