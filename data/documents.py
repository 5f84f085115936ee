"""Documents in and out."""
import json
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from data.filters import LIMITS
from lib.args import InputError, require
from lib.files import open_text, read_jsonl, atomic_path

# ---------------------------------------------------------------------------------------------
# reading

def read_documents(path: str | Path, source: str = ""):
    """Yields the documents of a .txt (split at lines that read <|endoftext|>, else one document),
    .jsonl or .parquet (field "text"; "source" and "kind" if given); .gz too for the first two.
    The source is by default `source` or the file's name, and becomes a file name: no slashes, dots.
    Raises InputError with file and line."""
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        with open_text(path) as file:
            try:
                parts = re.split(r"(?m)^<\|endoftext\|>\s*$", file.read())
            except (UnicodeDecodeError, EOFError, OSError) as error:
                raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        rows = ((f"{path}", {"text": part}) for part in parts if part.strip())
    elif name.endswith(".jsonl"):
        rows = ((f"{path}:{number}", row) for number, row in read_jsonl(path))
    else:
        require(name.endswith(".parquet"), f"{path}: no directory, .txt, .jsonl (.gz) or .parquet")
        rows = read_parquet(path)
    for where, row in rows:
        require(isinstance(row.get("text"), str), f'{where}: want a string under "text"')
        require(row.get("kind") in (None, *LIMITS), f'{where}: "kind" is one of {list(LIMITS)}')
        found = re.sub(r"[^\w-]", "_", str(row.get("source") or source or name.rsplit(".", 1)[0]))
        yield {"text": row["text"], "source": found, "kind": row.get("kind") or "prose"}


def read_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    try:
        parts = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = enumerate((row for part in parts for row in part.to_pylist()), 1)
        yield from ((f"{path}: row {number}", row) for number, row in rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a parquet file ({error})") from None


def read_all(paths: str):
    """The documents of files and directories, comma-separated. Of a directory all .jsonl, .jsonl.gz
    and .parquet files are read, which are one source if they name none."""
    for path in map(Path, paths.split(",")):
        files = [path]
        if path.is_dir():
            files = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz", "*.parquet")
                           for file in path.glob(pattern))
            require(len(files) > 0, f"{path}: no .jsonl or .parquet files in it")
        for file in files:
            yield from read_documents(file, path.name if path.is_dir() else "")


def new_directory(path: str, overwrite: bool) -> Path:
    """An --out. report.json is written last: no report, no finished run."""
    out = Path(path)
    if (out / "report.json").exists():
        require(overwrite, f"{out} holds a finished run: pass --overwrite or another --out")
        (out / "report.json").unlink()
        for file in [*out.glob("*.jsonl"), *out.glob("*.bin"), *out.glob("*.ends")]:
            file.unlink()
    return out


def write_sources(out: Path, documents) -> dict[str, int]:
    """Documents to {source}.jsonl, one at a time -> how many each source got."""
    counts = Counter()
    with ExitStack() as stack:
        files = {}
        for doc in documents:
            name = doc["source"]
            if name not in files:
                temporary = stack.enter_context(atomic_path(out / f"{name}.jsonl"))
                files[name] = stack.enter_context(open(temporary, "w", encoding="utf-8"))
            files[name].write(json.dumps(doc, ensure_ascii=False) + "\n")
            counts[name] += 1
    return dict(counts)
