"""The built-in corpus: real text that comes with every Python, and generated questions.

With it every stage runs on any machine, without a network. The real text is Python's language
reference and the code of its standard library, which holds its documentation. The generated
documents are questions with answers from tasks/: the report's synthetic data (section 3.1) at a
small scale.

    python -m data --max_mb 6 --synthetic_mb 2 --out runs/data
"""
import os
import sysconfig
from pathlib import Path

import numpy as np

from lib.args import require

# Tests are data more than text. pydoc_data holds the language reference, which is read apart.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages",
           "pydoc_data", "__pycache__"}

# Shares of tokens, our choice: a little real text, the rest generated questions.
BUILTIN_WEIGHTS = {"stdlib_reference": 0.02, "stdlib_code": 0.02,
                   "mathematics": 0.34, "code": 0.12, "instruction": 0.24, "logic": 0.26}


def stdlib_files(root: str) -> list[str]:
    """Return the paths of the modules below root. They are sorted, because the order of a directory
    listing differs between machines."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]  # os.walk skips them
        for name in files:
            unwanted = name.startswith(("test_", "_sysconfigdata"))  # the latter has local paths
            if name.endswith(".py") and not unwanted:
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def builtin_corpus(seed: int = 0, max_mb: float = 6.0) -> dict[str, list[dict]]:
    """Return {source: documents}: the language reference, and up to `max_mb` of standard library
    files, sampled by `seed`. The corpus depends on the Python version, not on the machine. Raises
    InputError if this Python comes without its sources."""
    try:
        from pydoc_data.topics import topics  # what `help("topics")` shows
    except ImportError:  # some distributions package it apart
        topics = {}
    reference = [{"text": text, "source": "stdlib_reference", "name": topic}
                 for topic, text in sorted(topics.items())]
    root = sysconfig.get_path("stdlib")
    names = stdlib_files(root)
    require(len(names) > 0, "this Python has no standard library sources: pass --input")
    code = []
    size = 0
    for i in np.random.default_rng(seed).permutation(len(names)):
        name = names[i]
        text = Path(root, name).read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > max_mb * 1e6:
            break
        code.append({"text": text, "source": "stdlib_code", "kind": "code", "name": name})
    return {"stdlib_reference": reference, "stdlib_code": code}


def synthetic(domain: str, n_bytes: int, seed: int) -> list[str]:
    """Return generated texts of one of tasks.queries.DOMAINS that hold at least n_bytes."""
    import tasks.queries  # here, because only this share of the corpus needs it
    texts = []
    stream = tasks.queries.documents(domain, seed)
    while n_bytes > 0:
        text = next(stream)
        texts.append(text)
        n_bytes -= len(text.encode())
    return texts
