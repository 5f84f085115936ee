"""Near-duplicates."""
import hashlib
import re
import sqlite3
from functools import lru_cache
from zlib import crc32

import numpy as np

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


SHINGLE = 5  # words


class NearDuplicates:
    """A stage that drops what equals an earlier kept document but for spaces, or nearly does (of
    generated ones, kind "synthetic", only what is equal).

    Near: MinHash over word 5-grams, `bands` bands of `rows` hashes. A pair of Jaccard similarity s
    meets in some band with probability 1 - (1 - s^rows)^bands: 5% at 0.5, 77% at 0.75, 99.96% at
    0.9 (FineWeb's setting). Over the half million pairs among 1000 pages of one template 5% is too
    many, so a pair must also agree in a share `threshold` of all hashes (an estimate of s, +-0.04);
    threshold=0 follows the bare curve. Only kept documents are matched: no chain A~B~C drops C.

    What was seen, 1.5 KB a document, lies in a temporary file of SQLite: memory stays flat."""

    def __init__(self, threshold: float = 0.75, *, bands: int = 14, rows: int = 8,
                 seed: int = 0):
        random = np.random.default_rng(seed)
        self.a = random.integers(0, 2**64, bands * rows, dtype=np.uint64) | np.uint64(1)
        self.b = random.integers(0, 2**64, bands * rows, dtype=np.uint64)
        self.threshold, self.rows, self.count = threshold, rows, 0
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
            signature = minhash(ngram_hashes(ids, min(SHINGLE, len(ids))), self.a, self.b)
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
