"""Pre-training data: documents in; clean, de-duplicated, decontaminated, mixed tokens out.

Report section 3.1 improves the data in four ways: filtering (Qwen2-Instruct models score every
document), more mathematics and code, synthetic data, a mixture with fewer templated web pages.
Prompts, thresholds and ratios are not disclosed. Here stands the public part of the craft:
heuristic filters with a reason for every dropped document, MinHash near-duplicate removal, token
shares, and the report's own decontamination rule (section 5).

    python data.py                              # on text found on any machine, under a minute
    python data.py --input web.jsonl.gz,books.parquet --weights web=0.7,books=0.3 --out runs/mine

A document is {"text", "source"?, "kind"?}; kind is prose, code or synthetic. The run writes
{source}.jsonl per source and report.json. Not covered: scoring by a model, language
identification, personal data, licences. All documents of a run are in memory.
"""
import ast
import hashlib
import json
import os
import re
import sysconfig
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from common import InputError, cli, open_text, read_jsonl, require, write_atomic, write_jsonl

# ---------------------------------------------------------------------------------------------
# reading

def read_documents(path: str | Path):
    """Yields the documents of a .txt (split at lines that read <|endoftext|>, else one document),
    .jsonl or .parquet (field "text"; "source" and "kind" if given); .gz too for the first two.
    The source is by default the file's name, and becomes a file name: no slashes, no dots.
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
        require(name.endswith(".parquet"), f"{path}: want .txt, .jsonl (or .gz of these), .parquet")
        rows = read_parquet(path)
    for where, row in rows:
        require(isinstance(row.get("text"), str), f'{where}: want a string under "text"')
        require(row.get("kind") in (None, *LIMITS), f'{where}: "kind" is one of {list(LIMITS)}')
        source = re.sub(r"[^\w-]", "_", str(row.get("source") or name.rsplit(".", 1)[0]))
        yield {"text": row["text"], "source": source, "kind": row.get("kind") or "prose"}


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


# ---------------------------------------------------------------------------------------------
# cleaning: normalise, then filters that each give a reason

# Gopher (Rae et al. 2021, table A1) and StarCoder (Li et al. 2023, section 3) publish such limits;
# where a value differs it is our choice, made by reading what the built-in corpus lost.
LIMITS = {
    "prose": {"min_bytes": 80, "max_bytes": 1e9,       # Gopher: 50 words; a worked sum has fewer
              "mean_line": 1e9, "max_line": 1e9,       # a paragraph is often one line
              "symbols": 0.30, "digits": 0.40,         # of the non-space characters
              "repeated": 0.20, "top_4gram": 0.16},    # of the characters, as Gopher
    "code": {"min_bytes": 80, "max_bytes": 1e6, "mean_line": 100, "max_line": 1000,  # StarCoder
             "symbols": 0.50, "digits": 0.25, "repeated": 0.50, "top_4gram": 0.30},
    # What damns a web page says nothing about generated questions: sums are all digits.
    "synthetic": {"min_bytes": 1, "max_bytes": 1e9, "mean_line": 1e9, "max_line": 1e9,
                  "symbols": 1, "digits": 1, "repeated": 1, "top_4gram": 1},
}
# Joiners (200C, 200D) carry meaning and stay; a lone surrogate could not be written as UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ud800-\udfff]")
SYMBOL = re.compile(r"[!-/:-@\[-`{-~\u2010-\u2bff]")  # no \W: it would count Indic vowel signs
# U+FFFD, C1 controls, and UTF-8 read as Latin-1 or cp1252 (e-acute becomes two characters).
MOJIBAKE = re.compile("\ufffd|[\x80-\x9f]|[\xc2\xc3][\xa0-\xbf]|\xe2\u20ac")
FURNITURE = re.compile(r"cookie policy|privacy policy|terms of (use|service)|all rights reserved|"
                       r"enable javascript|sign up for|subscribe to|click here|log in to", re.I)
GENERATED = re.compile(r"auto-?\s?generated|generated (by|from|automatically)|do not edit", re.I)


def normalise(text: str) -> str:
    """NFC (as the tokenizer does), newlines only, no control characters (a BOM, a form feed), no
    trailing spaces, at most two blank lines in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]+$", "", CONTROL.sub("", text), flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def length(text: str, kind: str = "prose") -> str:
    """Bytes, not words: Chinese has no spaces."""
    size = len(text.encode("utf-8", "replace"))
    inside = LIMITS[kind]["min_bytes"] <= size <= LIMITS[kind]["max_bytes"]
    return "" if inside else f"{size} bytes"


def encoding(text: str, kind: str = "prose") -> str:
    """Decoding damage above one character in 1000, so that a page about mojibake survives."""
    damage = len(MOJIBAKE.findall(text))
    return f"{damage} damaged characters" if damage > len(text) / 1000 else ""


def long_lines(text: str, kind: str = "prose") -> str:
    """Minified code and data in code."""
    sizes = [len(line) for line in text.split("\n")]
    longest, mean = max(sizes), sum(sizes) / len(sizes)
    bad = longest > LIMITS[kind]["max_line"] or mean > LIMITS[kind]["mean_line"]
    return f"{mean:.0f} characters a line, at most {longest}" if bad else ""


def symbols(text: str, kind: str = "prose") -> str:
    """Rulers, ASCII art, markup. Spaces do not count: indentation would dilute it in code."""
    ratio = len(SYMBOL.findall(text)) / max(1, len("".join(text.split())))
    return f"{ratio:.0%} symbols" if ratio > LIMITS[kind]["symbols"] else ""


def digits(text: str, kind: str = "prose") -> str:
    """Tables, logs, character maps: nothing to learn but the numbers themselves."""
    ratio = len(re.findall(r"\d", text)) / max(1, len("".join(text.split())))
    return f"{ratio:.0%} digits" if ratio > LIMITS[kind]["digits"] else ""


def repetition(text: str, kind: str = "prose") -> str:
    """Two of Gopher's measures: characters in lines seen before, and characters covered by the most
    frequent 4 words. A phrase counts from its 4th use: in a short text 2 uses are already 16%."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    ratio = 1 - sum(map(len, set(lines))) / max(1, sum(map(len, lines)))
    if ratio > LIMITS[kind]["repeated"]:
        return f"{ratio:.0%} in repeated lines"
    words = text.split()
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
    ratio = count * sum(map(len, gram)) / max(1, sum(map(len, words)))
    bad = count >= 4 and ratio > LIMITS[kind]["top_4gram"]
    return f"{ratio:.0%} is {' '.join(gram)[:40]!r}" if bad else ""


def boilerplate(text: str, kind: str = "prose") -> str:
    """Code: a machine-made file says so at its top. Prose: filler, or page furniture on a tenth of
    the lines (C4 cuts such lines out; a page that consists of them we drop)."""
    if kind == "code":
        found = GENERATED.search("\n".join(text.split("\n", 6)[:6]))
        return f"says {found[0]!r}" if found else ""
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    lines = [line for line in text.split("\n") if line.strip()]
    found = sum(FURNITURE.search(line) is not None for line in lines)
    bad = found > max(1, len(lines) / 10)  # a copyright line alone is harmless
    return f"{found} of {len(lines)} lines are furniture" if bad else ""


# The first reason counts, so the counts add up. Gopher's stop-word test is left out: it drops
# every language but English.
FILTERS = {f.__name__: f for f in
           (length, encoding, long_lines, symbols, digits, repetition, boilerplate)}


def clean(documents, samples: int = 3) -> tuple[list[dict], dict]:
    """Normalise and filter. Returns (kept, report): "documents" = "kept" + the sum of "dropped"
    {filter: count}; "samples" {"kept" or filter: first few {"text" (its start), "reason"}}."""
    kept, dropped, shown, count = [], Counter(), defaultdict(list), 0
    for doc in documents:
        doc, count = doc | {"text": normalise(doc["text"])}, count + 1
        verdicts = ((name, f(doc["text"], doc.get("kind", "prose"))) for name, f in FILTERS.items())
        name, reason = next((v for v in verdicts if v[1]), ("kept", ""))
        if reason:
            dropped[name] += 1
        else:
            kept.append(doc)
        if len(shown[name]) < samples:
            shown[name].append({"text": doc["text"][:200], "reason": reason})
    return kept, {"documents": count, "kept": len(kept), "dropped": dict(dropped),
                  "samples": dict(shown)}


# ---------------------------------------------------------------------------------------------
# near-duplicates and contamination: both compare sequences of words

# Lower-case words without punctuation; a Han or Kana character is a word by itself.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")


def word_ids(text: str) -> np.ndarray:
    """(words,) uint64, the CRC-32 of each word: Python's own hash differs from run to run."""
    return np.array([crc32(w.encode("utf-8", "replace")) for w in WORD.findall(text.lower())],
                    dtype=np.uint64)


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """(T,) uint64 -> (T - n + 1,) uint64: a polynomial in the n ids modulo 2^64, then the
    splitmix64 finaliser, because MinHash needs every bit to depend on every id."""
    h = np.zeros(max(0, len(ids) - n + 1), dtype=np.uint64)
    for k in range(n):
        h = h * np.uint64(0x9E3779B97F4A7C15) + ids[k:k + len(h)]
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def minhash(shingles: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) shingles -> (len(a),) signature, min over the set of a*x + b modulo 2^64. Two sets agree
    at a position with probability their Jaccard similarity (Broder 1997)."""
    signature = np.full(len(a), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 2048):  # blocks of 2 MB stay in cache
        block = shingles[None, start:start + 2048] * a[:, None] + b[:, None]
        np.minimum(signature, block.min(1), out=signature)
    return signature


def deduplicate(documents, threshold: float = 0.75, *, ngram: int = 5, bands: int = 14,
                rows: int = 8, seed: int = 0) -> tuple[list[dict], list[tuple[int, int, float]]]:
    """Drop what equals an earlier kept document but for spaces, or nearly does (of generated ones,
    kind "synthetic", only what is equal).

    Near: MinHash over word 5-grams, `bands` bands of `rows` hashes. A pair of Jaccard similarity s
    meets in some band with probability 1 - (1 - s^rows)^bands: 5% at 0.5, 77% at 0.75, 99.96% at
    0.9 (FineWeb's setting). Over the half million pairs among 1000 pages of one template 5% is too
    many, so a pair must also agree in a share `threshold` of all hashes (an estimate of s, +-0.04);
    threshold=0 follows the bare curve. Only kept documents are matched: no chain A~B~C drops C.

    Returns (kept, [(dropped index, kept index, estimated similarity)])."""
    random = np.random.default_rng(seed)
    a = random.integers(0, 2**64, bands * rows, dtype=np.uint64) | np.uint64(1)
    b = random.integers(0, 2**64, bands * rows, dtype=np.uint64)
    kept, pairs, exact, signatures, buckets = [], [], {}, {}, defaultdict(list)
    for i, doc in enumerate(documents):
        digest = hashlib.blake2b(" ".join(doc["text"].split()).encode("utf-8", "replace")).digest()
        match, score = exact.get(digest), 1.0
        # Generated questions that differ in a number are alike on purpose.
        ids = word_ids(doc["text"]) if doc.get("kind") != "synthetic" else ()
        if match is None and len(ids):
            signature = minhash(ngram_hashes(ids, min(ngram, len(ids))), a, b)
            keys = [(k, row.tobytes()) for k, row in enumerate(signature.reshape(bands, rows))]
            near = {j for key in keys for j in buckets.get(key, ())}
            agree = [(float((signatures[j] == signature).mean()), -j) for j in near]
            score, first = max(agree, default=(-1.0, 0))
            if score >= threshold:
                match = -first
            else:
                signatures[i] = signature
                for key in keys:
                    buckets[key].append(i)
        exact[digest] = i if match is None else match
        if match is None:
            kept.append(doc)
        else:
            pairs.append((i, match, score))
    return kept, pairs


def lcs_length(a, b) -> int:
    """Longest common subsequence in len(b) steps on len(a)-bit integers (Hyyro 2004): bit i of
    `row` is 0 where a[:i+1] has a longer LCS with the b read so far than a[:i] has."""
    where = defaultdict(int)
    for i, token in enumerate(a):
        where[token] |= 1 << i
    full = row = (1 << len(a)) - 1
    for token in b:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def decontaminate(documents, eval_texts, encode=word_ids, *, minimum: int = 13,
                  ratio: float = 0.6) -> tuple[list[dict], list[dict]]:
    """The report's rule (section 5): drop s_t if for some test sequence s_e the longest common
    subsequence has >= 13 tokens and >= 0.6 min(|s_t|, |s_e|); a shared 13-gram finds candidates.

    The rule is for sequences: in a whole long document almost any tokens turn up in order. So s_t
    is the stretch of 2|s_e| tokens around where the 13-gram puts s_e; a hit drops the document.
    `encode` gives integers. Its default, words without case and punctuation, follows Qwen2.5-Math
    and needs no tokenizer. Test items below 13 tokens cannot be found by this rule.
    Returns (kept, hits [{"document": index, "eval": index, "lcs", "text"}])."""
    evals = [np.asarray(encode(text), dtype=np.uint64) for text in eval_texts]
    index = defaultdict(list)  # 13-gram -> [(eval, position in it)]
    for e, ids in enumerate(evals):
        for q, gram in enumerate(ngram_hashes(ids, minimum).tolist()):
            index[gram].append((e, q))
    known, kept, hits = np.array(sorted(index), dtype=np.uint64), [], []

    def find(ids):
        grams, tried = ngram_hashes(ids, minimum), set()
        for p in np.flatnonzero(np.isin(grams, known)).tolist():
            for e, q in index[int(grams[p])]:
                m = len(evals[e])
                start = p - q - m // 2
                if (e, start // (m // 4 + 1)) in tried:
                    continue  # the 13-grams of one passage give nearly the same stretch
                tried.add((e, start // (m // 4 + 1)))
                stretch = ids[max(0, start):start + 2 * m]
                lcs = lcs_length(evals[e].tolist(), stretch.tolist())
                if lcs >= max(minimum, ratio * min(m, len(ids))):
                    return {"eval": e, "lcs": lcs}

    for i, doc in enumerate(documents):
        if hit := find(np.asarray(encode(doc["text"]), dtype=np.uint64)):
            hits.append({"document": i, **hit, "text": doc["text"][:200]})
        else:
            kept.append(doc)
    return kept, hits


def is_held_out(text: str) -> bool:
    """One document in fifty, by its hash, is for measuring the loss only: the same ones whatever
    the order, the mixture or the seed."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50 == 0


# ---------------------------------------------------------------------------------------------
# tokens: documents -> mixture -> packed rows

def tokenize(texts, tok) -> list[np.ndarray]:
    """One array per text, each ending in <|endoftext|> as in Qwen's packed pre-training. uint16 if
    the vocabulary fits, else uint32: the corpus stays in memory, and int64 is 2-4 times it."""
    dtype = np.uint16 if max(tok.n_vocab, tok.eos_id + 1) <= 2**16 else np.uint32
    texts, arrays = iter(texts), []
    while chunk := list(islice(texts, 1000)):  # Python's lists of ints live 1000 texts at a time
        arrays += [np.array([*ids, tok.eos_id], dtype=dtype) for ids in tok.encode_batch(chunk)]
    return arrays


def parse_weights(text: str, default: dict[str, float]) -> dict[str, float]:
    """ "a=0.7,b=0.3" -> {source: weight}; empty -> the default."""
    try:
        pairs = (part.split("=") for part in text.split(",") if part)
        return {name.strip(): float(value) for name, value in pairs} or dict(default)
    except ValueError:
        raise InputError(f"--weights wants name=0.5,name=0.5, got {text!r}") from None


def mix(sources: dict[str, list[np.ndarray]], weights: dict[str, float], tokens: int,
        seed: int) -> tuple[list[np.ndarray], dict]:
    """A stream of `tokens` tokens in which each source has its weight's share of the *tokens*
    (R2.5): by documents, a source of long ones would take far more than its weight.

    A source is read in random order, a new one in every epoch; its last document is cut to meet the
    share (and keeps its end token). Sources are spread evenly, so that every long stretch of the
    stream has the shares. A pure function. Returns (arrays, report {source: {weight, share, tokens,
    available, documents, epochs, warning}}); raises InputError."""
    unknown, total = set(weights) - set(sources), sum(weights.values())
    require(not unknown, f"weights for {sorted(unknown)}, but the sources are {sorted(sources)}")
    require(total > 0 and min(weights.values()) >= 0, f"weights must be >= 0, got {weights}")
    stream, report = [], {}
    for name, weight in weights.items():
        docs, want, done, epoch, count = sources[name], round(tokens * weight / total), 0, 0, 0
        available = sum(map(len, docs))
        require(available > 0 or want == 0, f"source {name} is empty, but its weight is {weight}")
        while done < want:
            # Keyed by name, so that adding a source leaves the order within the others as it was.
            random = np.random.default_rng([seed, crc32(name.encode()), epoch])
            for i in random.permutation(len(docs)):
                doc = docs[i]
                if len(doc) > want - done:
                    doc = np.append(doc[:want - done - 1], doc[-1:])
                stream.append(((done + random.random() * len(doc)) / want, len(stream), doc))
                done, count = done + len(doc), count + 1
                if done == want:
                    break
            epoch += 1
        # Muennighoff et al. 2023: up to 4 epochs are nearly as good as new text.
        epochs = want / max(1, available)
        report[name] = {"weight": weight, "share": want / tokens, "tokens": want,
                        "available": available, "documents": count, "epochs": round(epochs, 2),
                        "warning": "read more than 4 times" if epochs > 4 else ""}
    return [doc for _, _, doc in sorted(stream, key=lambda item: item[:2])], report


def pack(docs: list[np.ndarray], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate documents (with their end tokens, see `tokenize`) and cut. Returns ids and
    segment_ids, both (n, seq_len + 1) int32: inputs are [:, :-1], targets [:, 1:]; a segment id is
    the document's index, for attention that stays inside documents. The last total % (seq_len + 1)
    tokens fill no row and are dropped; raises InputError if those are all."""
    sizes = np.array([len(doc) for doc in docs], dtype=np.int64)
    n = int(sizes.sum()) // (seq_len + 1)
    require(n > 0, f"{sizes.sum()} tokens do not fill one row of {seq_len} + 1")
    ids = np.concatenate(docs)[:n * (seq_len + 1)].astype(np.int32)
    segment_ids = np.repeat(np.arange(len(docs), dtype=np.int32), sizes)[:len(ids)]
    return torch.from_numpy(ids).view(n, -1), torch.from_numpy(segment_ids).view(n, -1)


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
    """Generated texts of one of tasks.DOMAINS, until they hold n_bytes."""
    import tasks  # here, because only this share needs what it imports
    texts, stream = [], tasks.documents(domain, seed)
    while n_bytes > 0:
        texts.append(next(stream))
        n_bytes -= len(texts[-1].encode())
    return texts


# ---------------------------------------------------------------------------------------------

@dataclass
class Args:
    out: str = "runs/data"         # directory for {source}.jsonl and report.json
    input: str = ""                # comma-separated .txt, .jsonl, .parquet; empty: built-in corpus
    evals: str = "test"            # tests to keep out: names or files for tasks.load, with commas
    max_mb: float = 6.0            # of standard library files in the built-in corpus
    synthetic_mb: float = 2.0      # of generated documents in the built-in corpus
    threshold: float = 0.75        # estimated Jaccard similarity that makes a near-duplicate
    show_dropped: int = 1          # dropped samples to print per reason
    seed: int = 0                  # of the corpus sample and the generators
    overwrite: bool = False        # replace what --out holds


def load(args: Args) -> tuple[list[dict], list[str]]:
    """The documents, and the test prompts that they must not hold."""
    import tasks
    prompts = [query["prompt"] for name in args.evals.split(",") if name
               for query in tasks.load(name, 400 if name in tasks.SPLITS else 10**9)]
    if args.input:
        return [doc for path in args.input.split(",") for doc in read_documents(path)], prompts
    corpus = builtin_corpus(args.seed, args.max_mb)
    for domain in tasks.DOMAINS:
        texts = synthetic(domain, int(args.synthetic_mb * 1e6 / len(tasks.DOMAINS)), args.seed)
        corpus[domain] = [{"text": t, "source": domain, "kind": "synthetic"} for t in texts]
    return [doc for docs in corpus.values() for doc in docs], prompts


def main(args: Args) -> dict:
    started, out = time.time(), Path(args.out)
    if (out / "report.json").exists():
        require(args.overwrite, f"{out} holds a finished run: pass --overwrite or another --out")
        for name in json.loads((out / "report.json").read_text(encoding="utf-8"))["sources"]:
            (out / f"{name}.jsonl").unlink(missing_ok=True)
        (out / "report.json").unlink()  # it is written last: no report, no finished run
    documents, prompts = load(args)

    kept, cleaned = clean(documents, max(3, args.show_dropped))
    unique, pairs = deduplicate(kept, args.threshold, seed=args.seed)
    # `tasks` writes documents and test prompts from the same templates and splits them by prompt.
    # The report's 60% would take two changed numbers for a copy, so there all words must match.
    made = [doc.get("kind") == "synthetic" for doc in unique]
    parts = [decontaminate([d for d, m in zip(unique, made, strict=True) if m is flag], prompts,
                           ratio=1.0 if flag else 0.6) for flag in (False, True)]
    final, hits = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    dropped = cleaned["dropped"] | {"duplicate": len(pairs), "contaminated": len(hits)}
    samples = cleaned["samples"] | {
        "duplicate": [{"text": kept[i]["text"][:200], "reason": f"{score:.0%} like "
                       f"{kept[j]['text'][:60]!r}"} for i, j, score in pairs],
        "contaminated": [{"text": hit["text"], "reason": f"{hit['lcs']} words in common with test "
                          f"item {prompts[hit['eval']][:60]!r}"} for hit in hits]}
    require(len(final) > 0, f"nothing is left of {len(documents)} documents: {dropped}")

    sources = {}
    print(f"{'source':<20}{'documents':>10}{'MB':>8}{'kept':>8}{'MB':>8}{'of MB':>7}")
    for name in sorted({doc["source"] for doc in documents}):
        (n, mb), (m, kept_mb) = ((len(sizes), sum(sizes) / 1e6) for sizes in (
            [len(doc["text"].encode("utf-8", "replace")) for doc in docs if doc["source"] == name]
            for docs in (documents, final)))
        sources[name] = {"documents": n, "mb": mb, "kept": m, "kept_mb": kept_mb}
        print(f"{name:<20}{n:>10}{mb:>8.2f}{m:>8}{kept_mb:>8.2f}{kept_mb / max(mb, 1e-9):>7.0%}")
        write_jsonl(out / f"{name}.jsonl", (doc for doc in final if doc["source"] == name))
    print(f"\ndropped {sum(dropped.values())} of {len(documents)} documents:")
    for name, count in dropped.items():
        print(f"  {name:<14}{count:>6}")
        for sample in samples.get(name, [])[:args.show_dropped]:
            text = " ".join(sample["text"].split())[:48]
            print(f"    {sample['reason']}: {text!r}"[:140])

    result = {"args": asdict(args), "seconds": round(time.time() - started, 1), "sources": sources,
              "dropped": dropped, "samples": {k: v[:20] for k, v in samples.items()}}
    write_atomic(out / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"data: {out} ready after {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    cli(main, Args)
