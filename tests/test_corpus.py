"""data/corpus.py: real text that every Python has, and generated documents. R2.1 is a number of
docs/requirements.md."""
import sysconfig

import data.corpus


def test_r21_builtin_corpus_is_real_deterministic_and_without_tests():
    corpus = data.corpus.builtin_corpus(0, max_mb=1.0)
    assert corpus == data.corpus.builtin_corpus(0, max_mb=1.0)
    assert list(corpus) == ["stdlib_reference", "stdlib_code"]
    assert all(docs and all(d["source"] == name for d in docs) for name, docs in corpus.items())
    assert 0.5e6 < sum(len(d["text"]) for d in corpus["stdlib_code"]) <= 1e6
    assert corpus != data.corpus.builtin_corpus(1, max_mb=1.0)
    names = data.corpus.stdlib_files(sysconfig.get_path("stdlib"))
    assert len(names) > 300 and names == sorted(names) and "json/decoder.py" in names
    for name in names:
        assert not {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(name.split("/"))
        assert not name.split("/")[-1].startswith("test_")


def test_synthetic_fills_the_bytes_asked_for(fake_tasks):
    texts = data.corpus.synthetic("code", 2000, 0)
    sizes = [len(t.encode()) for t in texts]
    assert sum(sizes) >= 2000 > sum(sizes[:-1]) and texts == data.corpus.synthetic("code", 2000, 0)
    assert data.corpus.synthetic("code", 0, 0) == []
