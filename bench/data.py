"""Preparing pre-training data, stage by stage, in MB of text.

The texts are real ones from ../shared/data/text, cut into lines of 120 characters. A document is 25
lines drawn at random; every tenth document comes again with a changed end. `duplicates` is compared
with datasketch at the same 14 bands of 8 hashes over the same word 5-grams. (datasketch follows the
bare curve and keeps its index in memory.) "Checked" is the number of documents kept. The memory is
the peak above the process with its texts.
"""
import random

import harness
from harness import SHARED, memory, timed

MB = 6


def documents():
    r, size = random.Random(0), 0
    text = " ".join((SHARED / "text" / name).read_text("utf-8")
                    for name in ("wikitext2_valid.txt", "sherlock.txt", "wiki_demo.txt"))
    lines = [text[i:i + 120] for i in range(0, len(text), 120)]
    while size < MB * 1_000_000:
        lot = r.choices(lines, k=25)
        for document in ["\n".join(lot)] + ["\n".join(lot[:24])] * (r.random() < 0.1):
            size += len(document.encode())
            yield document


def measure(run):
    """run(texts) -> documents kept."""
    texts = list(documents())
    size, before = sum(len(text.encode()) for text in texts) / 1e6, memory(reset=True)
    out = timed(lambda: run(texts), repeats=1, warmup=0)
    return out | {"work": size, "extra": {"MB": memory(peak=True) - before},
                  "check": [out["result"]]}


def ours(case):
    harness.ours()
    import data.__main__
    from data import contamination
    from data import dedup
    from data import filters
    from data import language
    from data import mixture
    from data import quality
    from tokenizer import Tokenizer

    def kept(stages, texts):
        verdicts = filters.run_filters(({"text": text} for text in texts), stages)
        return sum(verdict.stage == "kept" for verdict in verdicts)
    tests, model = data.__main__.load_tests("test"), quality.Classifier(2)
    tok = Tokenizer.from_pretrained(SHARED / "tokenizer" / "qwen.tiktoken")
    return measure({
        "rules": lambda texts: kept(filters.FILTERS, texts),
        "language": lambda texts: len([language.language(text) for text in texts]),
        "duplicates": lambda texts: kept({"near": dedup.NearDuplicates(0.0)}, texts),
        "contamination": lambda texts: kept({"tests": contamination.Contamination(tests)}, texts),
        "tokens": lambda texts: len(mixture.tokenize(texts, tok).ends),
        "classifier": lambda texts: len([quality.classify(model, ["low", "quality"], text)
                                         for text in texts])}[case])


def datasketch(case):
    import re

    from datasketch import MinHash, MinHashLSH

    def run(texts):
        lsh, kept = MinHashLSH(num_perm=112, params=(14, 8)), 0
        for i, text in enumerate(texts):
            words = re.findall(r"[^\W_]+", text.lower())
            sketch = MinHash(num_perm=112)
            sketch.update_batch([" ".join(words[j:j + 5]).encode() for j in range(len(words) - 4)])
            if not lsh.query(sketch):
                lsh.insert(i, sketch)
                kept += 1
        return kept
    return measure(run)


SYSTEMS = {"ours": (ours, None), "datasketch": (datasketch, "datasketch")}
CASES = {name: ["ours"] for name in ("rules", "language", "contamination", "tokens", "classifier")}
CASES["duplicates"] = ["ours", "datasketch"]

if __name__ == "__main__":
    harness.main("Pre-training data", "MB", SYSTEMS, CASES if SHARED.exists() else {})
