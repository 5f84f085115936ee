"""Test items in training documents."""
from collections import defaultdict

import numpy as np

from data.dedup import ngram_hashes, word_ids

MIN_COMMON = 13   # tokens
MIN_SHARE = 0.6    # of the shorter sequence


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

    def __init__(self, tests: list[str], encode=word_ids):
        self.tests, self.encode = tests, encode
        self.ids = [np.asarray(encode(text), dtype=np.uint64) for text in tests]
        self.index = defaultdict(list)  # 13-gram -> [(test, position in it)]
        for e, ids in enumerate(self.ids):
            for q, gram in enumerate(ngram_hashes(ids, MIN_COMMON).tolist()):
                self.index[gram].append((e, q))
        self.known = np.array(sorted(self.index), dtype=np.uint64)

    def find(self, text: str, kind: str = "prose") -> tuple[int, int]:
        """-> (test item, common tokens), (-1, 0) where there is none."""
        ids, tried = np.asarray(self.encode(text), dtype=np.uint64), set()
        grams, ratio = ngram_hashes(ids, MIN_COMMON), 1.0 if kind == "synthetic" else MIN_SHARE
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
                if lcs >= max(MIN_COMMON, ratio * min(m, len(ids))):
                    return e, lcs
        return -1, 0

    def __call__(self, text: str, kind: str = "prose") -> str:
        e, lcs = self.find(text, kind)
        return "" if e < 0 else f"{lcs} words in common with test item {self.tests[e][:60]!r}"
