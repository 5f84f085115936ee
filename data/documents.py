"""Documents in and out: .txt, .jsonl and .json files become one stream of dicts.

A document is {"text", "source", "kind"}. The source names the file that it is written to, and the
weight that a mixture gives it. The kind is prose, code or synthetic, and sets the limits of the
filters. Everything reads and writes one document at a time, so the input need not fit in memory.

    for document in read_all("web/,books.jsonl,notes.txt.gz"):
        print(document["source"], document["text"][:60])
"""
import json
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from data.filters import LIMITS
from lib.args import InputError, require
from lib.files import atomic_path, read_jsonl, read_texts

# ---------------------------------------------------------------------------------------------
# reading

def read_documents(path: str | Path, source: str = ""):
    """Yield the documents of one .txt, .jsonl or .json file, which may end in .gz.

    A row has a "text", and optionally a "source" and a "kind". Without one, the source is `source`
    or else the file's name, and the kind is prose. Raises InputError with the file and the line."""
    path = Path(path)
    kind = file_kind(path)
    if kind == "txt":
        rows = enumerate({"text": text} for text in read_texts(path) if text.strip())
    elif kind in ("jsonl", "json"):
        rows = read_jsonl(path)
    else:
        raise InputError(f"{path}: no directory, .txt, .jsonl or .json (.gz)")
    default_source = source or path.name[:path.name.lower().rindex(f".{kind}")]
    for number, row in rows:
        yield to_document(row, f"{path}:{number}", default_source)


def file_kind(path: Path) -> str:
    """Return how the name ends, such as "jsonl" for web.JSONL.gz."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def to_document(row: dict, where: str, default_source: str) -> dict:
    kind = row.get("kind") or "prose"
    require(isinstance(row.get("text"), str), f'{where}: "text" must be a string')
    require(kind in list(LIMITS), f'{where}: "kind" must be one of {list(LIMITS)}')
    source = as_source(str(row.get("source") or default_source))
    return {"text": row["text"], "source": source, "kind": kind}


def as_source(name: str) -> str:
    """Return a name that can be a source, and so a file's: without slashes and dots."""
    return re.sub(r"[^\w-]", "_", name)


def read_all(paths: str):
    """Yield the documents of files and directories, whose names are separated by commas. In a
    directory, all .jsonl and .txt files are read; they are one source unless their rows name
    others. Its .json files are reports and settings, and merges.txt is a tokenizer's: these are
    left out."""
    for name in paths.split(","):
        require(name != "", f"{paths!r} names a file that has no name: is a comma too many?")
        path = Path(name)
        if not path.is_dir():
            yield from read_documents(path)
            continue
        files = [file for file in sorted(path.iterdir()) if file.name != "merges.txt"
                 and file_kind(file) in ("txt", "jsonl")]
        require(len(files) > 0, f"{path}: no .jsonl or .txt files in it")
        for file in files:
            yield from read_documents(file, path.name)


# ---------------------------------------------------------------------------------------------
# writing

def new_directory(path: str, overwrite: bool, *inputs: str) -> Path:
    """Return --out as a Path, without what a former run left there. A finished run has a
    report.json, which is written last. A run that was killed has none, and its files would mix with
    the next run's. Only --overwrite removes either, and never `inputs`, paths joined by commas."""
    out = Path(path)
    place = out.resolve()
    for name in filter(None, ",".join(inputs).split(",")):
        given = Path(name).resolve()
        overlap = place == given or place in given.parents or given in place.parents
        require(not overlap, f"--out {out} overlaps with what is read, {name}: pass another --out")
    require(not (out / "run.json").exists(), f"{out} holds a training run: pass another --out")
    old = []
    for pattern in ("report.json", "*.jsonl", "*.jsonl.tmp", "*.bin", "*.ends"):
        old.extend(out.glob(pattern))
    require(overwrite or not old, f"{out} holds a run, finished or not, or other data: pass "
            "--overwrite, which deletes its files, or another --out")
    for file in old:
        file.unlink()
    return out


def write_sources(out: Path, documents) -> dict[str, int]:
    """Write each document to {source}.jsonl, and return how many each source got. The files appear
    under their names when all documents are written."""
    counts = Counter()
    files = {}
    with ExitStack() as stack:
        for document in documents:
            source = document["source"]
            if source not in files:
                temporary = stack.enter_context(atomic_path(out / f"{source}.jsonl"))
                files[source] = stack.enter_context(
                    open(temporary, "w", encoding="utf-8", errors="backslashreplace"))
            files[source].write(json.dumps(document, ensure_ascii=False) + "\n")
            counts[source] += 1
    return dict(counts)
