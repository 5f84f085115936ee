"""Pre-training data: documents in; clean, de-duplicated, decontaminated, mixed tokens out.

Report section 3.1 improves the data in four ways: filtering (Qwen2-Instruct models score every
document), more mathematics and code, synthetic data, a mixture with fewer templated web pages.
Prompts, thresholds and ratios are not disclosed. Here stands the public part of the craft:
heuristic filters with a reason for every dropped document, MinHash near-duplicate removal, token
shares, and the report's own decontamination rule (section 5).

    python data.py                              # on text found on any machine, under a minute
    python data.py --input web.jsonl.gz,books.parquet --languages en,zh --out runs/mine
    python data.py --input web/ --tokenizer runs/demo/tokenizer --out runs/web    # and tokens

A document is {"text", "source"?, "kind"?}; kind is prose, code or synthetic. The run writes
{source}.jsonl per source, with --tokenizer memory-mapped token files for pretrain.py, and
report.json. It reads document by document: memory does not grow with the input (LOG.md,
"pre-training data"). Scores by models: quality.py. Not covered: personal data, licences.
"""
import ast
import hashlib
import json
import os
import re
import sqlite3
import sysconfig
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from common import InputError, cli, open_text, read_jsonl, replacing, require, write_atomic
from ifeval import language

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
                temporary = stack.enter_context(replacing(out / f"{name}.jsonl"))
                files[name] = stack.enter_context(open(temporary, "w", encoding="utf-8"))
            files[name].write(json.dumps(doc, ensure_ascii=False) + "\n")
            counts[name] += 1
    return dict(counts)


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


def other_language(text: str, kind: str = "prose", wanted=()) -> str:
    """A page where not even one word in twenty is a frequent one of its language is "unknown"."""
    if not wanted or kind != "prose":
        return ""
    found, share = language(text)
    found = found if share > 0.05 else "unknown"
    return "" if found in wanted else f"language {found}"


# The first reason counts, so the counts add up. Gopher's stop-word test is left out: it drops
# every language but English.
FILTERS = {f.__name__: f for f in
           (length, encoding, long_lines, symbols, digits, repetition, boilerplate)}


def verdicts(documents, stages: dict):
    """Yields (document, stage, reason): each document normalised, with the first stage that gives a
    reason to drop it, or ("kept", "")."""
    for doc in documents:
        doc = doc | {"text": normalise(doc["text"])}
        reasons = ((name, f(doc["text"], doc.get("kind", "prose"))) for name, f in stages.items())
        yield doc, *next((pair for pair in reasons if pair[1]), ("kept", ""))


# ---------------------------------------------------------------------------------------------
# near-duplicates and contamination: both compare sequences of words

# Lower-case words without punctuation; a Han or Kana character is a word by itself.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")


@lru_cache(1)  # two stages ask for the same text
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


class NearDuplicates:
    """A stage that drops what equals an earlier kept document but for spaces, or nearly does (of
    generated ones, kind "synthetic", only what is equal).

    Near: MinHash over word 5-grams, `bands` bands of `rows` hashes. A pair of Jaccard similarity s
    meets in some band with probability 1 - (1 - s^rows)^bands: 5% at 0.5, 77% at 0.75, 99.96% at
    0.9 (FineWeb's setting). Over the half million pairs among 1000 pages of one template 5% is too
    many, so a pair must also agree in a share `threshold` of all hashes (an estimate of s, +-0.04);
    threshold=0 follows the bare curve. Only kept documents are matched: no chain A~B~C drops C.

    What was seen, 1.5 KB a document, lies in a temporary file of SQLite: memory stays flat."""

    def __init__(self, threshold: float = 0.75, *, ngram: int = 5, bands: int = 14, rows: int = 8,
                 seed: int = 0):
        random = np.random.default_rng(seed)
        self.a = random.integers(0, 2**64, bands * rows, dtype=np.uint64) | np.uint64(1)
        self.b = random.integers(0, 2**64, bands * rows, dtype=np.uint64)
        self.threshold, self.ngram, self.rows, self.count = threshold, ngram, rows, 0
        self.seen = sqlite3.connect("")  # no name: removed with the process
        self.seen.executescript("""
            pragma journal_mode = off; pragma cache_size = -32768;
            create table texts (digest blob primary key, id integer) without rowid;
            create table kept (id integer primary key, start text, signature blob);
            create table bands (key integer, id integer, primary key (key, id)) without rowid""")

    def find(self, text: str, kind: str = "prose") -> tuple[int, float]:
        """-> (index of the kept document that this one repeats, estimated similarity), or (-1, 0);
        then it counts as kept. Documents are counted by calls."""
        index, self.count = self.count, self.count + 1
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"),
                                 digest_size=16).digest()
        known = self.seen.execute("select id from texts where digest = ?", (digest,)).fetchone()
        if known:
            return known[0], 1.0
        match, score, signature = -1, 0.0, None
        # Generated questions that differ in a number are alike on purpose.
        ids = word_ids(text) if kind != "synthetic" else ()
        if len(ids):
            signature = minhash(ngram_hashes(ids, min(self.ngram, len(ids))), self.a, self.b)
            keys = ngram_hashes(signature, self.rows)[::self.rows].view(np.int64).tolist()
            near = self.seen.execute(
                "select id, signature from kept where id in (select id from bands where key "
                f"in ({','.join('?' * len(keys))}))", keys)
            agree = [(float((np.frombuffer(other, np.uint64) == signature).mean()), -j)
                     for j, other in near]
            best, first = max(agree, default=(-1.0, 0))
            if best >= self.threshold:
                match, score = -first, best
            else:
                self.seen.executemany("insert into bands values (?, ?)",
                                      ((key, index) for key in keys))
        if match < 0:
            self.seen.execute("insert into kept values (?, ?, ?)", (index, text[:60], signature))
        self.seen.execute("insert into texts values (?, ?)",
                          (digest, index if match < 0 else match))
        return match, score

    def __call__(self, text: str, kind: str = "prose") -> str:
        match, score = self.find(text, kind)
        if match < 0:
            return ""
        start = self.seen.execute("select start from kept where id = ?", (match,)).fetchone()[0]
        return f"{score:.0%} like {start!r}"


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


class Contamination:
    """A stage that drops test items, by the report's rule (section 5): s_t goes if for some test
    sequence s_e the longest common subsequence has >= 13 tokens and >= 0.6 min(|s_t|, |s_e|); a
    shared 13-gram finds candidates.

    The rule is for sequences: in a whole long document almost any tokens turn up in order. So s_t
    is the stretch of 2|s_e| tokens around where the 13-gram puts s_e; a hit drops the document.
    `encode` gives integers. Its default, words without case and punctuation, follows Qwen2.5-Math
    and needs no tokenizer. Test items below 13 tokens cannot be found by this rule.

    `tasks` writes documents and test prompts from the same templates and splits them by prompt. In
    these 60% would take two changed numbers for a copy: of kind "synthetic", all must match."""

    def __init__(self, tests: list[str], encode=word_ids, *, minimum: int = 13, ratio: float = 0.6):
        self.tests, self.encode, self.minimum, self.ratio = tests, encode, minimum, ratio
        self.ids = [np.asarray(encode(text), dtype=np.uint64) for text in tests]
        self.index = defaultdict(list)  # 13-gram -> [(test, position in it)]
        for e, ids in enumerate(self.ids):
            for q, gram in enumerate(ngram_hashes(ids, minimum).tolist()):
                self.index[gram].append((e, q))
        self.known = np.array(sorted(self.index), dtype=np.uint64)

    def find(self, text: str, kind: str = "prose") -> tuple[int, int]:
        """-> (test item, common tokens), (-1, 0) where there is none."""
        ids, tried = np.asarray(self.encode(text), dtype=np.uint64), set()
        grams, ratio = ngram_hashes(ids, self.minimum), 1.0 if kind == "synthetic" else self.ratio
        places = np.searchsorted(self.known[:-1], grams)  # of the first that is not smaller
        for p in np.flatnonzero(self.known[places] == grams) if len(self.known) else ():
            for e, q in self.index[int(grams[p])]:
                m = len(self.ids[e])
                start = int(p) - q - m // 2
                if (e, start // (m // 4 + 1)) in tried:
                    continue  # the 13-grams of one passage give nearly the same stretch
                tried.add((e, start // (m // 4 + 1)))
                stretch = ids[max(0, start):start + 2 * m]
                lcs = lcs_length(self.ids[e].tolist(), stretch.tolist())
                if lcs >= max(self.minimum, ratio * min(m, len(ids))):
                    return e, lcs
        return -1, 0

    def __call__(self, text: str, kind: str = "prose") -> str:
        e, lcs = self.find(text, kind)
        return "" if e < 0 else f"{lcs} words in common with test item {self.tests[e][:60]!r}"


def sift(documents, stages: dict) -> tuple[list[dict], dict]:
    """`verdicts` for lists that fit in memory -> documents kept, report {"kept": n, "dropped":
    {stage: n}, "samples": {stage: [[reason, start of the text], at most 3]}}."""
    kept, dropped, samples = [], Counter(), defaultdict(list)
    for doc, name, reason in verdicts(documents, stages):
        if not reason:
            kept.append(doc)
            continue
        dropped[name] += 1
        samples[name] = (samples[name] + [[reason, doc["text"][:200]]])[:3]
    return kept, {"kept": len(kept), "dropped": dict(dropped), "samples": dict(samples)}


def clean(documents) -> tuple[list[dict], dict]:
    return sift(documents, FILTERS)


def deduplicate(documents, threshold: float = 0.75) -> tuple[list[dict], dict]:
    return sift(documents, {"duplicate": NearDuplicates(threshold)})


def decontaminate(documents, eval_texts, encode=word_ids) -> tuple[list[dict], dict]:
    return sift(documents, {"contaminated": Contamination(list(eval_texts), encode)})


def is_held_out(text: str) -> bool:
    """One document in fifty, by its hash, is for measuring the loss only: the same ones whatever
    the order, the mixture or the seed."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50 == 0


# ---------------------------------------------------------------------------------------------
# tokens: documents -> mixture -> packed rows

@dataclass
class Tokens:
    """Documents as one long array of ids, in memory or memory-mapped, with the places where each
    starts and ends."""
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return self.ends - self.starts

    def longer(self, length: int) -> "Tokens":
        """Pieces of exactly `length`, as many as the documents hold."""
        n = self.sizes // length
        starts = np.repeat(self.starts - length * (n.cumsum() - n), n) + length * np.arange(n.sum())
        return Tokens(self.ids, starts, starts + length)

    def shorter(self, length: int) -> "Tokens":
        some = self.sizes < length
        return Tokens(self.ids, self.starts[some], self.ends[some])


def id_arrays(texts, tok):
    """An array per text, each ending in <|endoftext|> as in Qwen's packed pre-training. uint16 if
    the vocabulary fits, else uint32: int64 is 2-4 times it."""
    texts = iter(texts)
    while chunk := list(islice(texts, 1000)):  # Python's lists of ints live 1000 texts at a time
        for ids in tok.encode_batch(chunk):
            yield np.array([*ids, tok.eos_id], dtype=id_type(tok))


def id_type(tok):
    return np.uint16 if max(tok.n_vocab, tok.eos_id + 1) <= 2**16 else np.uint32


def tokenize(texts, tok) -> Tokens:
    arrays = [np.empty(0, id_type(tok)), *id_arrays(texts, tok)]
    ends = np.cumsum([len(ids) for ids in arrays])
    return Tokens(np.concatenate(arrays), ends[:-1], ends[1:])


def write_tokens(stem: Path, texts, tok) -> None:
    """{stem}.bin, the ids, and {stem}.ends, int64: what `read_tokens` maps into memory."""
    end = 0
    with replacing(f"{stem}.bin") as ids, replacing(f"{stem}.ends") as ends:
        with open(ids, "wb") as ids_file, open(ends, "wb") as ends_file:
            for array in id_arrays(texts, tok):
                end += len(array)
                ids_file.write(array)
                ends_file.write(np.int64(end))


def read_tokens(stem: Path, tok) -> Tokens:
    size = Path(f"{stem}.bin").stat().st_size  # an empty file cannot be mapped
    ids = np.memmap(f"{stem}.bin", id_type(tok), "r") if size else np.empty(0, id_type(tok))
    ends = np.fromfile(f"{stem}.ends", np.int64)
    require(len(ids) == (ends[-1] if len(ends) else 0),
            f"{stem}.bin and .ends are not of one piece: run data.py again")
    return Tokens(ids, np.append(0, ends)[:-1], ends)


def parse_weights(text: str, default: dict[str, float]) -> dict[str, float]:
    """ "a=0.7,b=0.3" -> {source: weight}; empty -> the default."""
    try:
        pairs = (part.split("=") for part in text.split(",") if part)
        return {name.strip(): float(value) for name, value in pairs} or dict(default)
    except ValueError:
        raise InputError(f"--weights wants name=0.5,name=0.5, got {text!r}") from None


def mix(sources: dict[str, Tokens], weights: dict[str, float], tokens: int,
        seed: int) -> tuple[np.ndarray, dict]:
    """A stream of `tokens` tokens in which each source has its weight's share of the *tokens*
    (R2.5): by documents, a source of long ones would take far more than its weight.

    A source is read in random order, a new one in every epoch; its last document is cut to meet the
    share (and keeps its end token). Sources are spread evenly, so that every long stretch of the
    stream has the shares. A pure function. Returns (stream (n, 3): number of the source in
    `sources`, document, tokens of it; report {source: {weight, share, tokens, available, documents,
    epochs, warning}}); raises InputError."""
    unknown, total = set(weights) - set(sources), sum(weights.values())
    require(not unknown, f"weights for {sorted(unknown)}, but the sources are {sorted(sources)}")
    require(total > 0 and min(weights.values()) >= 0, f"weights must be >= 0, got {weights}")
    stream, places, report = [], [], {}
    for name, weight in weights.items():
        want, done, epoch, count = round(tokens * weight / total), 0, 0, 0
        sizes, number = sources[name].sizes, list(sources).index(name)
        available = int(sizes.sum())
        require(available > 0 or want == 0, f"source {name} is empty, but its weight is {weight}")
        while done < want:
            # Keyed by name, so that adding a source leaves the order within the others as it was.
            random = np.random.default_rng([seed, crc32(name.encode()), epoch])
            docs = random.permutation(len(sizes))
            before = done + np.append(0, sizes[docs].cumsum()[:-1])
            docs, before = docs[before < want], before[before < want]
            size = np.minimum(sizes[docs], want - before)
            places.append((before + random.random(len(docs)) * size) / want)
            stream.append(np.stack((np.full(len(docs), number), docs, size), 1).astype(np.int32))
            done, count, epoch = int(before[-1] + size[-1]), count + len(docs), epoch + 1
        # Muennighoff et al. 2023: up to 4 epochs are nearly as good as new text.
        epochs = want / max(1, available)
        report[name] = {"weight": weight, "share": want / tokens, "tokens": want,
                        "available": available, "documents": count, "epochs": round(epochs, 2),
                        "warning": "read more than 4 times" if epochs > 4 else ""}
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(stream)[order], report


class Rows:
    """The documents of a stream (see `mix`), one after another, cut into rows of seq_len + 1
    tokens. rows[[3, 8]] reads two of them: ids and segment_ids, both (2, seq_len + 1) int64. Inputs
    are [:, :-1], targets [:, 1:]; a segment id is the document's place in the stream, for attention
    that stays inside documents. What fills no row is dropped; InputError if that is all."""

    def __init__(self, sources: list[Tokens], stream: np.ndarray, seq_len: int):
        self.sources, self.stream, self.width = sources, stream, seq_len + 1
        self.ends = np.cumsum(stream[:, 2], dtype=np.int64)
        self.n = int(self.ends[-1]) // self.width if len(stream) else 0
        require(self.n > 0, f"{stream[:, 2].sum()} tokens do not fill one row of {seq_len} + 1")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        out = np.empty((2, len(rows), self.width), dtype=np.int64)
        for r, row in enumerate(rows):
            done, i = 0, int(np.searchsorted(self.ends, row * self.width, side="right"))
            while done < self.width:
                source, doc, size = self.stream[i].tolist()
                tokens, skip = self.sources[source], row * self.width + done - self.ends[i] + size
                n, start = min(size - skip, self.width - done), tokens.starts[doc] + skip
                out[0, r, done:done + n] = tokens.ids[start:start + n]
                out[1, r, done:done + n] = i
                done, i = done + n, i + 1
                if skip + n == size:  # also of a document that was cut
                    out[0, r, done - 1] = tokens.ids[tokens.ends[doc] - 1]
        return torch.from_numpy(out[0]), torch.from_numpy(out[1])


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
    input: str = ""                # files or directories, comma-separated; empty: built-in corpus
    evals: str = "test"            # tests to keep out: names or files for tasks.load, with commas
    languages: str = ""            # of prose to keep, as en,zh,unknown (see ifeval.py); empty: all
    tokenizer: str = ""            # directory: write token files too, for pretrain.py to map
    max_mb: float = 6.0            # of standard library files in the built-in corpus
    synthetic_mb: float = 2.0      # of generated documents in the built-in corpus
    threshold: float = 0.75        # estimated Jaccard similarity that makes a near-duplicate
    show_dropped: int = 1          # dropped samples to print per reason, at most 20
    seed: int = 0                  # of the corpus sample and the generators
    overwrite: bool = False        # replace what --out holds


def load(args: Args):
    """The documents, one after another."""
    if args.input:
        yield from read_all(args.input)
        return
    import tasks
    for docs in builtin_corpus(args.seed, args.max_mb).values():
        yield from docs
    for domain in tasks.DOMAINS:
        for text in synthetic(domain, int(args.synthetic_mb * 1e6 / len(tasks.DOMAINS)), args.seed):
            yield {"text": text, "source": domain, "kind": "synthetic"}


def load_tests(names: str) -> list[str]:
    """The test items that documents must not hold, without what our prompts say around them."""
    import tasks
    items = [query.get("item", query["prompt"])
             for name in names.split(",") if name for query in tasks.load(name)]
    return [item if isinstance(item, str) else "\n".join(message["content"] for message in item)
            for item in items]


def main(args: Args) -> dict:
    started, out = time.time(), new_directory(args.out, args.overwrite)
    tok = None
    if args.tokenizer:
        from tokenizer import Tokenizer
        tok = Tokenizer.from_pretrained(args.tokenizer)
    wanted = tuple(filter(None, args.languages.split(",")))
    stages = FILTERS | {"language": partial(other_language, wanted=wanted),
                        "duplicate": NearDuplicates(args.threshold, seed=args.seed),
                        "contaminated": Contamination(load_tests(args.evals))}
    sources, dropped, samples = {}, Counter(), defaultdict(list)

    def kept():
        for doc, name, reason in verdicts(load(args), stages):
            row = sources.setdefault(doc["source"], dict.fromkeys(
                ("documents", "mb", "kept", "kept_mb"), 0))
            mb = len(doc["text"].encode("utf-8", "replace")) / 1e6
            row["documents"], row["mb"] = row["documents"] + 1, row["mb"] + mb
            if len(samples[name]) < 20 or name == "contaminated":  # these are listed in full
                samples[name].append({"text": doc["text"][:200], "reason": reason})
            if reason:
                dropped[name] += 1
            else:
                row["kept"], row["kept_mb"] = row["kept"] + 1, row["kept_mb"] + mb
                yield doc
    write_sources(out, kept())
    count = sum(row["documents"] for row in sources.values())
    require(sum(dropped.values()) < count, f"nothing is left of {count} documents: {dict(dropped)}")

    print(f"{'source':<20}{'documents':>10}{'MB':>8}{'kept':>8}{'MB':>8}")
    for name, row in sorted(sources.items()):
        print("{:<20}{:>10}{:>8.2f}{:>8}{:>8.2f}".format(name, *row.values()))
        for part in ("train", "held_out") if tok and row["kept"] else ():
            texts = (doc["text"] for doc in read_documents(out / f"{name}.jsonl"))
            write_tokens(out / f"{name}.{part}", (
                text for text in texts if is_held_out(text) == (part == "held_out")), tok)
    if tok:
        tok.save_pretrained(out)
    print(f"\ndropped {sum(dropped.values())} of {count} documents, for example:")
    for name, n in dropped.items():
        print(f"{n:>8} {name}")
        for sample in samples[name][:args.show_dropped]:
            print(f"{'':9}{sample['reason']}: {' '.join(sample['text'].split())!r}"[:120])
    result = {"args": asdict(args), "seconds": round(time.time() - started, 1), "sources": sources,
              "dropped": dict(dropped), "samples": samples}
    write_atomic(out / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"data: {out} ready after {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    cli(main, Args)
