"""Decontamination: training documents must not hold test items (report section 5).

The report drops a training sequence s_t if, for some test sequence s_e, their longest common
subsequence (LCS) has at least 13 tokens and at least 0.6 min(|s_t|, |s_e|) tokens; a shared 13-gram
finds the candidates. Three things are our choice:

- The rule is for sequences, and in a whole long document almost any tokens turn up in order. So s_t
  is the stretch of 2|s_e| tokens around the place where the 13-gram puts s_e. A hit drops the whole
  document.
- Tokens are words without case and punctuation, as in Qwen2.5-Math; this needs no tokenizer.
- tasks/ writes generated documents and test prompts from the same templates, so 60% in common only
  means two changed numbers. In a document of kind "synthetic" all tokens must match.

A test item with fewer than 13 tokens cannot be found by this rule.
"""
from collections import defaultdict
from typing import NamedTuple

from data.dedup import ngram_hashes, word_ids
from data.filters import normalise

MIN_COMMON = 13  # tokens
MIN_SHARE = 0.6  # of the shorter sequence


def lcs_length(a, b) -> int:
    """Return the length of the longest common subsequence, in len(b) steps on integers of len(a)
    bits (Hyyro 2004). Bit i of `row` is 0 where a[:i+1] has a longer LCS with the part of b read so
    far than a[:i] has."""
    where = defaultdict(int)
    for i, token in enumerate(a):
        where[token] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


class Hit(NamedTuple):
    item: int    # index of the test item, or -1
    common: int  # tokens of the longest common subsequence


class Contamination:
    """A stage that drops documents which hold a test item."""

    def __init__(self, tests: list[str]):
        self.tests = tests
        self.ids = [word_ids(normalise(text)) for text in tests]  # as documents are
        self.places = defaultdict(list)  # 13-gram -> [(test item, position in it)]
        for item, ids in enumerate(self.ids):
            for position, gram in enumerate(ngram_hashes(ids, MIN_COMMON).tolist()):
                self.places[gram].append((item, position))

    def find(self, text: str, kind: str = "prose") -> Hit:
        """Return the first test item that the document holds, or Hit(-1, 0)."""
        ids = word_ids(text)
        grams = ngram_hashes(ids, MIN_COMMON).tolist()
        if self.places.keys().isdisjoint(grams):  # as most documents are
            return Hit(-1, 0)
        min_share = 1.0 if kind == "synthetic" else MIN_SHARE
        tried = set()
        for position, gram in enumerate(grams):
            for item, offset in self.places.get(gram, []):
                size = len(self.ids[item])
                start = position - offset - size // 2
                # The 13-grams of one passage give nearly the same stretch: one of them is enough.
                passage = (item, start // (size // 4 + 1))
                if passage in tried:
                    continue
                tried.add(passage)
                stretch = ids[max(0, start):start + 2 * size]
                common = lcs_length(self.ids[item].tolist(), stretch.tolist())
                if common >= max(MIN_COMMON, min_share * min(size, len(ids))):
                    return Hit(item, common)
        return Hit(-1, 0)

    def __call__(self, text: str, kind: str = "prose") -> str:
        item, common = self.find(text, kind)
        if item < 0:
            return ""
        return f"{common} words in common with test item {self.tests[item][:60]!r}"
