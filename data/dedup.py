"""Near-duplicate documents, found by MinHash.

The Qwen2.5 report does not say how its corpus was de-duplicated; the Qwen1 report names exact
matches, MinHash and LSH. Here a document is dropped if it equals an earlier kept document but for
white space, or if it shares most of its runs of five words with one. The settings are FineWeb's
(14 bands of 8 hashes); the threshold is our choice. `python -m data` runs this as one stage:

    stage = NearDuplicates(threshold=0.75)
    stage(text)         # "" the first time, then "100% like 'The council met ...'"
"""
import hashlib
import re
import sqlite3
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np

SHINGLE = 5  # words per shingle: documents are compared by their sets of 5-grams

# ---------------------------------------------------------------------------------------------
# hashes of words and of runs of words; data/contamination.py uses them too

# A word is lower-case and without punctuation; a Han or Kana character is a word by itself.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")


@lru_cache(1)  # two stages ask for the same text
def word_ids(text: str) -> np.ndarray:
    """Return the CRC-32 of each word, (words,) uint64. Python's own hash changes with each run."""
    words = WORD.findall(text.lower())
    return np.array([crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Hash each run of n ids: (T,) uint64 -> (T - n + 1,) uint64.

    A polynomial in the n ids modulo 2^64 goes through splitmix64's finaliser, because MinHash needs
    every bit to depend on every id."""
    h = np.zeros(max(0, len(ids) - n + 1), dtype=np.uint64)
    for k in range(n):
        h = h * np.uint64(0x9E3779B97F4A7C15) + ids[k:k + len(h)]
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def minhash(shingles: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the signature of a set of shingles: (n,) -> (len(a),), all uint64.

    Entry k is the minimum of a[k] x + b[k] modulo 2^64 over the set. Two sets agree in one entry
    with a probability that is their Jaccard similarity (Broder 1997)."""
    signature = np.full(len(a), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 2048):  # blocks of 2 MB stay in the cache
        block = shingles[None, start:start + 2048] * a[:, None] + b[:, None]
        np.minimum(signature, block.min(1), out=signature)
    return signature


# ---------------------------------------------------------------------------------------------
# the stage

class Match(NamedTuple):
    index: int         # of the kept document that this one repeats, or -1
    similarity: float  # estimated Jaccard similarity


NO_MATCH = Match(-1, 0.0)


class NearDuplicates:
    """A stage that drops documents which repeat an earlier kept one.

    A pair of Jaccard similarity s has one band of `rows` hashes in common with probability
    1 - (1 - s^rows)^bands: 5% at s = 0.5, 77% at 0.75, 99.96% at 0.9. Of half a million pairs of
    pages from one template 5% are too many, so a pair must also agree in a share `threshold` of all
    hashes, which estimates s with a standard error of 0.04 at 0.75; threshold=0 gives the bare
    curve.

    Only kept documents are matched, so a chain A~B~C does not drop C. Generated documents (kind
    "synthetic") are only dropped if they are equal: questions that differ in one number are alike
    on purpose. What was seen, 1.5 KB per document, lies in a temporary file of SQLite."""

    def __init__(self, threshold: float = 0.75, *, bands: int = 14, rows: int = 8, seed: int = 0):
        random = np.random.default_rng(seed)
        self.a = random.integers(0, 2**64, bands * rows, dtype=np.uint64) | np.uint64(1)
        self.b = random.integers(0, 2**64, bands * rows, dtype=np.uint64)
        self.threshold = threshold
        self.rows = rows
        self.count = 0
        self.seen = sqlite3.connect("")  # without a name: it goes with the process
        self.seen.executescript("""
            pragma journal_mode = off; pragma cache_size = -32768;
            create table kept (id integer primary key, start text, signature blob);
            create table bands (key integer, id integer, primary key (key, id)) without rowid""")

    def find(self, text: str, kind: str = "prose") -> Match:
        """Return the Match of this document, and remember it as kept if there is none. Documents
        are numbered by calls. Its keys are a hash of the whole text and one of each band."""
        index = self.count
        self.count += 1
        content = " ".join(text.split()).encode("utf-8", "replace")
        digest = hashlib.blake2b(content, digest_size=8).digest()
        text_key = int.from_bytes(digest, "big", signed=True)  # SQLite has signed integers only
        equal = self.seen.execute("select id from bands where key = ?", (text_key,)).fetchone()
        if equal:
            return Match(equal[0], 1.0)
        signature = None
        band_keys = []
        ids = [] if kind == "synthetic" else word_ids(text)
        if len(ids) > 0:
            signature = minhash(ngram_hashes(ids, min(SHINGLE, len(ids))), self.a, self.b)
            band_keys = ngram_hashes(signature, self.rows)[::self.rows].view(np.int64).tolist()
        match = self.find_near(signature, band_keys)
        if match == NO_MATCH:
            self.seen.execute("insert into kept values (?, ?, ?)", (index, text[:60], signature))
            bands = [(key, index) for key in (text_key, *band_keys)]
            self.seen.executemany("insert into bands values (?, ?)", bands)
        return match

    def find_near(self, signature: np.ndarray | None, keys: list[int]) -> Match:
        """Return the most similar kept document that shares a band, if it is similar enough; among
        equally similar ones the first. All pages of one template may share a band: to compare each
        with all would take quadratic time, so only the first 50 of a band are candidates."""
        band = "select id from (select id from bands where key = ? order by id limit 50)"
        some = " union ".join([band] * len(keys))
        candidates = self.seen.execute(
            f"select id, signature from kept where id in ({some}) order by id", keys)
        best = NO_MATCH
        for index, other in candidates:
            agree = np.frombuffer(other, np.uint64) == signature
            similarity = float(agree.mean())
            if similarity >= self.threshold and similarity > best.similarity:
                best = Match(index, similarity)
        return best

    def __call__(self, text: str, kind: str = "prose") -> str:
        match = self.find(text, kind)
        if match == NO_MATCH:
            return ""
        query = "select start from kept where id = ?"
        start = self.seen.execute(query, (match.index,)).fetchone()[0]
        return f"{match.similarity:.0%} like {start!r}"
