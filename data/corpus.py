"""The built-in corpus: real text that comes with every Python."""
import ast
import os
import sysconfig
import warnings
from pathlib import Path

import numpy as np

from lib.args import require

# ---------------------------------------------------------------------------------------------
# the built-in corpus: real text that comes with every Python

SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages",
           "pydoc_data", "__pycache__"}  # tests are data more than text; pydoc_data is read apart

# Token shares of the built-in corpus, our choice: a little real text, the rest synthetic questions.
BUILTIN_WEIGHTS = {"stdlib_reference": 0.01, "stdlib_docstrings": 0.02, "stdlib_code": 0.01,
                   "mathematics": 0.34, "code": 0.12, "instruction": 0.24, "logic": 0.26}


def stdlib_files(root: str) -> list[str]:
    """Paths below root, sorted: the order of a directory listing differs between machines."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED]  # not even walked: large
        found += [os.path.relpath(os.path.join(folder, f), root).replace(os.sep, "/")
                  for f in files if f.endswith(".py")
                  and not f.startswith(("test_", "_sysconfigdata"))]  # the latter: local paths
    return sorted(found)


def docstrings(node: ast.AST, name: str):
    """Yields "name, newline, dedented docstring" of a module, then of all it defines, in order."""
    if text := ast.get_docstring(node):
        yield f"{name}\n{text}"
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from docstrings(child, f"{name}.{child.name}")


def builtin_corpus(seed: int = 0, max_mb: float = 6.0) -> dict[str, list[dict]]:
    """{source: documents} from the running Python: the language reference (`help("topics")`), and
    docstrings and code of up to `max_mb` of standard library files, sampled by `seed`. (So a
    docstring is in two sources.) The same on every machine with the same Python version. Raises
    InputError where Python comes without its sources (embedded distributions)."""
    root, code, docs, size = sysconfig.get_path("stdlib"), [], [], 0
    names = stdlib_files(root)
    require(len(names) > 0, "this Python has no standard library sources: pass --input")
    for i in np.random.default_rng(seed).permutation(len(names)):
        text = Path(root, names[i]).read_text(encoding="utf-8", errors="replace")
        if (size := size + len(text)) > max_mb * 1e6:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            doc = "\n\n".join(docstrings(ast.parse(text), names[i][:-3].replace("/", ".")))
        code.append({"text": text, "source": "stdlib_code", "kind": "code", "name": names[i]})
        docs.append({"text": doc, "source": "stdlib_docstrings", "name": names[i]})
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        topics = {}
    reference = [{"text": text, "source": "stdlib_reference", "name": name}
                 for name, text in sorted(topics.items())]
    return {"stdlib_reference": reference, "stdlib_docstrings": docs, "stdlib_code": code}


def synthetic(domain: str, n_bytes: int, seed: int) -> list[str]:
    """Generated texts of one of tasks.queries.DOMAINS, until they hold n_bytes."""
    import tasks.queries  # here, because only this share needs what it imports
    texts, stream = [], tasks.queries.documents(domain, seed)
    while n_bytes > 0:
        texts.append(next(stream))
        n_bytes -= len(texts[-1].encode())
    return texts
