"""data/dedup.py: MinHash against its curve, exact copies, hashes. R2.3 is a number of
docs/requirements.md."""
import random

import numpy as np
import pytest
from helpers import CODE, PROSE, doc, nonsense

from data import dedup


def deduplicate(documents, threshold=0.75, **options):
    """-> (kept documents, [(dropped index, kept index, similarity)])."""
    stage, kept, dropped = dedup.NearDuplicates(threshold, **options), [], []
    for i, document in enumerate(documents):
        match, score = stage.find(document["text"], document.get("kind", "prose"))
        if match < 0:
            kept.append(document)
        else:
            dropped.append((i, match, score))
    return kept, dropped


def pair_of_jaccard(r, s, words=104, ngram=5):
    """Two texts of unique words with a common start, and their exact Jaccard similarity."""
    size = words - ngram + 1                          # shingles a text
    common = round(2 * size * s / (1 + s))            # c / (2 size - c) = s
    shared = nonsense(r, common + ngram - 1 if common else 0)
    a, b = (shared + nonsense(r, words - len(shared)) for _ in range(2))
    # punctuation differs, so that s = 1 is not already an exact duplicate
    return " ".join(a), ", ".join(b), common / (2 * size - common)


@pytest.mark.parametrize("bands,rows", [(14, 8), (20, 5)])
def test_r23_planted_pairs_follow_the_lsh_curve(bands, rows):
    n = 250
    for target in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        r = random.Random(int(target * 10))
        texts, s = [], 0.0
        for _ in range(n):
            a, b, s = pair_of_jaccard(r, target)
            texts += [a, b]
        assert abs(s - target) < 0.01
        _, dropped = deduplicate(map(doc, texts), threshold=0, bands=bands, rows=rows)
        assert all(i == j + 1 and j % 2 == 0 for i, j, _ in dropped)
        p = 1 - (1 - s**rows) ** bands
        sigma = (p * (1 - p) / n) ** 0.5
        assert abs(len(dropped) / n - p) <= 4 * sigma + 1e-9, (target, len(dropped) / n, p)


def test_r23_similarity_estimates_the_jaccard_index():
    r = random.Random(0)
    estimates = []
    for _ in range(100):
        a, b, s = pair_of_jaccard(r, 0.9)
        _, ((_, _, estimate),) = deduplicate([doc(a), doc(b)], threshold=0)
        estimates.append(estimate - s)
    assert abs(np.mean(estimates)) < 4 * (0.09 / 112 / 100) ** 0.5
    assert np.std(estimates) < 1.5 * (0.09 / 112) ** 0.5


def test_r23_templates_are_not_all_dropped_but_copies_are():
    r = random.Random(1)
    frame = nonsense(r, 60)
    pages = [" ".join(frame + nonsense(r, 30)) for _ in range(400)]  # pairwise s = 0.46
    copies = [" ".join(p.split()[:-2] + ["new", "end"]) for p in pages[:50]]
    kept, dropped = deduplicate(map(doc, pages + copies))
    assert len(kept) >= 399 and [d["text"] for d in kept[:99]] == pages[:99]
    assert {(i, j) for i, j, _ in dropped} >= {(400 + i, i) for i in range(50)}
    bare, _ = deduplicate(map(doc, pages + copies), threshold=0)
    assert len(bare) < 350  # the curve alone loses many: what deduplicate's docstring warns of


def test_pages_of_one_template_take_linear_time(monkeypatch):
    """Each shares some band with nearly all before it, but is compared with at most 50 per band; a
    copy of the last page is found nonetheless."""
    r = random.Random(3)
    frame = nonsense(r, 300)
    pages = [" ".join(frame + nonsense(r, 30)) for _ in range(900)]  # pairwise s = 0.82
    compared = []
    real = np.frombuffer
    monkeypatch.setattr(dedup.np, "frombuffer", lambda *args: compared.append(1) or real(*args))
    stage = dedup.NearDuplicates(1.0)
    assert all(stage.find(page).index < 0 for page in pages)
    assert len(compared) < 900 * 14 * 50 / 2 < 900 * 899 / 2
    assert stage.find(pages[-1].replace(" ", ", ")).index == 899


def test_r23_exact_duplicates_first_one_wins_and_nothing_is_lost():
    texts = [PROSE, CODE, PROSE.replace(" ", "\n  "), "???", "!!!", "", "  ", "a b", "a c", CODE]
    kept, dropped = deduplicate(map(doc, texts))
    assert [d["text"] for d in kept] == [PROSE, CODE, "???", "!!!", "", "a b", "a c"]
    assert dropped == [(2, 0, 1.0), (6, 5, 1.0), (9, 1, 1.0)]
    assert len(kept) + len(dropped) == len(texts)


def test_generated_documents_are_only_compared_exactly():
    """Questions that differ in one number are alike on purpose; the same one twice is not."""
    one, two = (" ".join(nonsense(random.Random(1), 80)) + f" {n}" for n in (3, 4))
    assert len(deduplicate([doc(one), doc(two)])[0]) == 1
    made = [doc(text, kind="synthetic") for text in (one, two, one)]
    assert deduplicate(made)[0] == made[:2]


def test_r23_no_chains():
    """b is near a, c is near b, but c is not near a: c stays."""
    r = random.Random(2)
    words = nonsense(r, 300)
    a, b, c = (" ".join(words[i:i + 200]) for i in (0, 20, 40))
    near = [bool(deduplicate(map(doc, two))[1]) for two in ((a, b), (b, c), (a, c))]
    assert near == [True, True, False]
    kept, dropped = deduplicate(map(doc, (a, b, c)))
    assert [d["text"] for d in kept] == [a, c] and [x[:2] for x in dropped] == [(1, 0)]


def test_words_and_hashes():
    words = ["don", "t", "stop", "新", "桥", "x2", "été"]
    assert dedup.WORD.findall("don't_stop 新桥 x2, été") == words
    assert dedup.word_ids("A b").tolist() == dedup.word_ids("a, B!").tolist()
    assert dedup.word_ids("a").tolist() == [0xE8B7BE43]  # CRC-32 of "a": the same on every machine
    ids = np.arange(50, dtype=np.uint64)
    assert len(dedup.ngram_hashes(ids, 13)) == 38 and len(dedup.ngram_hashes(ids[:5], 13)) == 0
    assert dedup.ngram_hashes(ids, 5)[7] == dedup.ngram_hashes(ids[7:12], 5)[0]
    assert dedup.ngram_hashes(ids[:5], 5)[0] != dedup.ngram_hashes(ids[4::-1], 5)[0]
