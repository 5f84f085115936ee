"""data/contamination.py: the LCS against dynamic programming, planted test items, the report's
thresholds. R2.4 is a number of docs/requirements.md."""
import random

import pytest
from helpers import PROSE, doc, filler, nonsense

import data.__main__
from data import contamination
from lib.files import read_jsonl


def decontaminate(documents, tests):
    """-> (kept documents, [(document, test item, common tokens)])."""
    stage, kept, hits = contamination.Contamination(tests), [], []
    for i, document in enumerate(documents):
        e, lcs = stage.find(document["text"], document.get("kind", "prose"))
        if e < 0:
            kept.append(document)
        else:
            hits.append((i, e, lcs))
    return kept, hits


def lcs_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    return table[-1][-1]


def test_r24_lcs_equals_the_quadratic_table():
    r = random.Random(3)
    for _ in range(300):
        k = r.randint(1, 12)
        a, b = ([r.randint(0, k) for _ in range(r.randint(0, 90))] for _ in range(2))
        assert contamination.lcs_length(a, b) == lcs_table(a, b)


def test_r24_planted_items_are_found_and_listed():
    r = random.Random(4)
    tests = [" ".join(nonsense(r, n)) for n in (13, 20, 60, 200)]
    long = [" ".join(nonsense(r, 5000)) for _ in tests]
    planted = [f"{text[:12000]} {test.upper()}! {text[12000:]}"
               for text, test in zip(long, tests, strict=True)]
    edited = tests[2].split()
    for i in (5, 25, 40, 55):
        edited[i] = "changed"                          # longest common run: 19
    edited[30:30] = ["inserted"] * 5
    planted.append(" ".join(nonsense(r, 300) + edited + nonsense(r, 300)))
    kept, hits = decontaminate([doc(t) for t in long + planted], tests)
    assert [d["text"] for d in kept] == long
    assert hits == [(4, 0, 13), (5, 1, 20), (6, 2, 60), (7, 3, 200), (8, 2, 56)]
    assert contamination.Contamination(tests)(planted[0]).startswith(
        "13 words in common with test item 'w"
    )


def test_test_items_are_normalised_as_documents_are():
    """A test item with combining accents is found in NFC."""
    words = nonsense(random.Random(8), 30)
    item = " ".join(f"{word}e\u0301" for word in words)  # two characters
    planted = " ".join(f"{word}\u00e9" for word in words)
    assert decontaminate([doc(planted)], [item])[1] == [(0, 0, 30)]


def test_r24_innocent_similar_documents_are_kept():
    r = random.Random(5)
    test = nonsense(r, 60)
    quote = nonsense(r, 100) + test[10:30] + nonsense(r, 100)  # 20 of 60: a 13-gram, no copy
    scattered = [w for t in test for w in (t, *nonsense(r, 9))]  # all words in order, no 13-gram
    documents = [doc(" ".join(quote)), doc(" ".join(scattered)), doc(PROSE), doc("")]
    kept, hits = decontaminate(documents, [" ".join(test), "too short to be found", ""])
    assert kept == documents and hits == []


def test_r24_thresholds_are_the_reports():
    """60 tokens: 36 in common are a hit, 35 are none. 13 in common of a short document are one."""
    r = random.Random(6)
    test = nonsense(r, 60)
    for n, hit in ((36, True), (35, False)):
        documents = [doc(" ".join(nonsense(r, 200) + test[:n] + nonsense(r, 200)))]
        assert bool(decontaminate(documents, [" ".join(test)])[1]) is hit
    for n, hit in ((13, True), (12, False)):           # |s_t| = 20 < |s_e|
        documents = [doc(" ".join(test[:n] + nonsense(r, 20 - n)))]
        assert bool(decontaminate(documents, [" ".join(test)])[1]) is hit
    documents = [doc(" ".join(test[:59]), kind="synthetic")]
    assert decontaminate(documents, [" ".join(test)])[1]  # all of the document
    documents = [doc(" ".join(test[:59] + nonsense(r, 5)), kind="synthetic")]
    assert not decontaminate(documents, [" ".join(test)])[1]


def test_r24_every_hit_of_a_phrase_is_tried():
    """The 13-gram stands twice in the test; the document's copy belongs to its second place."""
    r = random.Random(7)
    phrase, middle = nonsense(r, 13), nonsense(r, 100)
    test = phrase + middle + phrase
    edited = middle[:]
    edited[::9] = nonsense(r, 12)                      # so that no other 13-gram is shared
    before, after = nonsense(r, 300), nonsense(r, 300)
    for body, lcs in ((edited + phrase, 101), (phrase + edited, 101), (phrase, 0)):
        _, hits = decontaminate([doc(" ".join(before + body + after))], [" ".join(test)])
        assert [h[2] for h in hits] == ([lcs] if lcs else [])


@pytest.mark.slow
def test_planted_benchmark_items_are_all_found_in_20_mb(shared):
    """GSM8K and HumanEval: every item of at least 13 tokens, in a document of its own; the
    list names each, and no other document."""
    items = [row["question"] for _, row in read_jsonl(shared / "math" / "gsm8k_test.jsonl")]
    items += [row["prompt"] for _, row in read_jsonl(shared / "code" / "humaneval.jsonl")]
    tests = data.__main__.load_tests(
        f"{shared}/math/gsm8k_test.jsonl,{shared}/code/humaneval.jsonl"
    )
    stage, r = contamination.Contamination(tests), random.Random(1)
    documents = list(filler(shared, 20_000_000))
    places = r.sample(range(len(documents)), len(items))
    for item, i in zip(items, places, strict=True):
        at = r.randrange(len(documents[i]))
        documents[i] = documents[i][:at] + " " + item + " " + documents[i][at:]
    found = {i: e for i, text in enumerate(documents) if (e := stage.find(text)[0]) >= 0}
    short = [e for e, ids in enumerate(stage.ids) if len(ids) < 13]
    wanted = {i: e for e, i in enumerate(places) if e not in short}
    # An item may contain another, so what counts is which documents.
    assert found.keys() == wanted.keys() and len(wanted) == 1483 - len(short)
    assert sum(found[i] != e for i, e in wanted.items()) <= 3
    print(f"{len(wanted)} of {len(items)} planted, {len(short)} too short")
