"""data/mixture.py: token shares, tokens and their files, packing as a concatenation. R2.5 and R2.6
are numbers of docs/requirements.md."""
import types

import numpy as np
import pytest

from data import mixture
from data.mixture import Tokens, pack
from helpers import refuses
from lib.args import InputError


# ---------------------------------------------------------------------------------------------
# R2.5: mixture

def arrays(seed, n, low, high, end=9999):
    r = np.random.default_rng(seed)
    return tokens([np.append(r.integers(0, 9000, r.integers(low, high)), end).astype(np.uint16)
                   for _ in range(n)])


def tokens(docs):
    ends = np.cumsum([0, *map(len, docs)])
    return mixture.Tokens(np.concatenate([*docs, np.empty(0, np.uint16)]), ends[:-1], ends[1:])


def texts_of(stream, sources):
    """[(source, ids)] of a stream, the long way."""
    out = []
    for number, doc, size in stream.tolist():
        name, docs = list(sources.items())[number]
        ids = docs.ids[docs.starts[doc]:docs.ends[doc]]
        out.append((name, ids if size == len(ids) else np.append(ids[:size - 1], ids[-1:])))
    return out


SOURCES = {"web": arrays(0, 2000, 50, 900), "code": arrays(1, 20, 20_000, 60_000),
           "maths": arrays(2, 300, 20, 100)}
WEIGHTS = {"web": 5.0, "code": 3.0, "maths": 2.0}


def test_r25_weights_are_token_shares():
    """Within 1%, by counting the tokens of the stream."""
    stream, report = mixture.mix(SOURCES, WEIGHTS, 1_000_000, seed=0)
    texts = texts_of(stream, SOURCES)
    assert sum(len(ids) for _, ids in texts) == 1_000_000
    for name, share in (("web", 0.5), ("code", 0.3), ("maths", 0.2)):
        count = sum(len(ids) for source, ids in texts if source == name)
        row, available = report[name], len(SOURCES[name].ids)
        assert count == row["tokens"] == share * 1e6 and abs(row["share"] - share) < 1e-9
        assert row["available"] == available and row["epochs"] == round(share * 1e6 / available, 2)
        sizes = SOURCES[name].sizes[stream[:, 1][stream[:, 0] == list(SOURCES).index(name)]]
        cut = [len(ids) for source, ids in texts if source == name] != sizes
        assert cut.sum() <= 1                          # one cut document a source
    assert report["maths"]["epochs"] > 4 and report["maths"]["warning"]
    assert not report["web"]["warning"]
    assert all(ids[-1] == 9999 for _, ids in texts)    # a cut document keeps its end token


def test_r25_every_stretch_has_the_shares():
    sources = {"a": arrays(3, 3000, 50, 150), "b": arrays(4, 3000, 10, 500)}
    stream, _ = mixture.mix(sources, {"a": 0.25, "b": 0.75}, 400_000, seed=1)
    is_a = np.repeat(stream[:, 0] == 0, stream[:, 2])
    for part in is_a.reshape(8, -1):
        assert abs(part.mean() - 0.25) < 0.02


def test_r25_epochs_repeat_whole_sources_in_new_orders():
    sources = {"a": tokens([np.array([i, 99], dtype=np.uint16) for i in range(50)])}
    stream, report = mixture.mix(sources, {"a": 1.0}, 300, seed=0)
    order = stream[:, 1].tolist()
    epochs = [order[i:i + 50] for i in range(0, 150, 50)]
    assert report["a"]["epochs"] == 3 and all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_r26_mixture_is_a_pure_function_of_the_seed():
    def flat(seed):
        return mixture.mix(SOURCES, WEIGHTS, 50_000, seed)[0]
    assert np.array_equal(flat(7), flat(7)) and not np.array_equal(flat(7), flat(8))
    # a further source leaves the order within the others
    one = mixture.mix(SOURCES, {"web": 1}, 50_000, 7)[0][:-1, 1].tolist()
    two = mixture.mix(SOURCES, {"maths": 1, "web": 1}, 100_000, 7)[0]
    assert one == two[two[:, 0] == 0, 1][:len(one)].tolist()


@pytest.mark.parametrize("weights,match", [
    ({"web": 1, "wiki": 1}, "wiki"), ({"web": -1, "code": 2}, ">= 0"), ({"web": 0}, ">= 0"),
    ({}, ">= 0"), ({"empty": 1}, "empty"), ({"nothing": 1}, "nothing")])
def test_r25_bad_weights_are_refused(weights, match):
    sources = SOURCES | {"empty": tokens([]), "nothing": tokens([np.array([], dtype=np.uint16)])}
    with pytest.raises(InputError, match=match):
        mixture.mix(sources, weights, 1000, 0)


def test_weights_of_a_flag():
    assert mixture.parse_weights("a=0.5, b=2", {}) == {"a": 0.5, "b": 2.0}
    assert mixture.parse_weights("", {"a": 3}) == {"a": 3}
    for text in ("a", "a=x", "a=1=2"):
        with pytest.raises(InputError, match="--weights"):
            mixture.parse_weights(text, {})


# ---------------------------------------------------------------------------------------------
# R2.6: tokens and rows

class Letters:
    n_vocab, eos_id = 27, 26

    def encode_batch(self, texts):
        return [[ord(c) - 97 for c in text if c.isalpha()] for text in texts]


def test_tokenize_ends_every_document():
    texts = ["abc", "", "zz"] * 700                    # more than one chunk
    out = mixture.tokenize(texts, Letters())
    assert len(out.ends) == 2100 and out.sizes.tolist() == [4, 1, 3] * 700
    assert out.ids[:8].tolist() == [0, 1, 2, 26, 26, 25, 25, 26] and out.ids.dtype == np.uint16
    big = types.SimpleNamespace(n_vocab=151_665, eos_id=151_643, encode_batch=lambda t: [[151_664]])
    out = mixture.tokenize(["x"], big)
    assert out.ids.dtype == np.uint32 and out.ids.tolist() == [151_664, 151_643]
    assert len(mixture.tokenize([], Letters()).starts) == 0


def test_token_files_are_the_tokens(tmp_path):
    for i, texts in enumerate((["abc", "", "zz", "abcd\nef\ngh"], [])):
        mixture.write_tokens(tmp_path / f"{i}.train", texts, Letters())
        want, got = mixture.tokenize(texts, Letters()), mixture.read_tokens(tmp_path / f"{i}.train",
                                                                      Letters())
        for name in ("ids", "starts", "ends"):
            assert getattr(got, name).tolist() == getattr(want, name).tolist()
    assert isinstance(mixture.read_tokens(tmp_path / "0.train", Letters()).ids, np.memmap)
    with open(tmp_path / "0.train.bin", "ab") as file:
        file.write(b"ab")
    with pytest.raises(InputError, match="not of one piece"):
        mixture.read_tokens(tmp_path / "0.train", Letters())
    with open(tmp_path / "0.train.bin", "ab") as file:
        file.write(b"c")  # half an id
    with pytest.raises(InputError, match="not of one piece"):
        mixture.read_tokens(tmp_path / "0.train", Letters())
    with pytest.raises(InputError, match="not of one piece"):
        mixture.read_tokens(tmp_path / "missing", Letters())


def test_token_files_of_a_killed_run_are_refused(tmp_path):
    """report.json is written last."""
    mixture.write_tokens(tmp_path / "a.train", ["abc"], Letters())
    refuses(lambda: mixture.read_token_files(tmp_path, None), "has not finished", str(tmp_path))


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1000])
def test_r26_packed_rows_are_the_stream(seq_len):
    """Against concatenation, with a second source and a document that is cut."""
    docs = {"a": mixture.tokenize(["abcdefgh" * i for i in range(40)], Letters()),
            "b": mixture.tokenize(["xyz" * i for i in range(40)], Letters())}
    stream, _ = mixture.mix(docs, {"a": 0.6, "b": 0.4}, 5003, seed=0)
    rows, flat = mixture.PackedRows(list(docs.values()), stream, seq_len), texts_of(stream, docs)
    segments = np.concatenate([np.full(len(ids), i) for i, (_, ids) in enumerate(flat)])
    flat = np.concatenate([ids for _, ids in flat])
    n = len(rows) * (seq_len + 1)
    assert len(flat) - seq_len - 1 < n <= len(flat) == 5003
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    got, where = rows[order]
    assert str(got.dtype) == str(where.dtype) == "torch.int64"
    assert np.array_equal(got, flat[:n].reshape(-1, seq_len + 1)[order])
    assert np.array_equal(where, segments[:n].reshape(-1, seq_len + 1)[order])


def test_rows_refuse_less_than_a_row():
    docs = mixture.tokenize(["abc"], Letters())
    stream = np.array([[0, 0, 4]])
    with pytest.raises(InputError, match="4 tokens do not fill one row of 4"):
        mixture.PackedRows([docs], stream, 4)
    assert mixture.PackedRows([docs], stream, 3)[[0]][0].tolist() == [[0, 1, 2, 26]]


def test_pieces_of_longer_documents():
    docs = mixture.tokenize(["abcdefg", "ab", "", "abcdefghijk"], Letters())
    long, short = docs.long_pieces(4), docs.short_documents(4)
    pieces = [long.ids[a:b].tolist() for a, b in zip(long.starts, long.ends, strict=True)]
    assert pieces == [[0, 1, 2, 3], [4, 5, 6, 26], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 26]]
    assert short.sizes.tolist() == [3, 1]


def test_each_long_row_is_one_piece_whatever_the_weights():
    """A source's share of the longer rows is a whole number of rows, or it would shift the rows of
    all sources behind it."""
    sizes = np.array([1000] * 40 + [50] * 200)
    ends = sizes.cumsum()
    source = Tokens(np.zeros(ends[-1], np.uint16), ends - sizes, ends)
    weights = {"a": 0.9, "b": 0.025, "c": 0.025, "d": 0.025, "e": 0.025}
    rows, report = pack(dict.fromkeys(weights, source), weights, 20_000, 128, 0, 0.5)
    _, segments = rows[range(len(rows))]
    n_long = sum(row["tokens"] for name, row in report.items() if "longer" in name) // 129
    assert 75 <= n_long <= 79
    assert (segments[:n_long] == segments[:n_long, :1]).all()


@pytest.mark.parametrize("share", [-0.5, 1.0, 1.5, 0.001])
def test_a_long_share_that_fills_no_row_is_refused(share):
    sizes = np.array([300] * 5 + [50] * 20)
    ends = sizes.cumsum()
    source = Tokens(np.zeros(ends[-1], np.uint16), ends - sizes, ends)
    refuses(lambda: pack({"a": source}, {"a": 1.0}, 1290, 128, 0, share), "--long_share")


def test_long_rows_that_no_source_gets_are_refused():
    """One long row for three sources of a third each rounds to none."""
    sizes = np.array([300] * 5 + [50] * 20)
    ends = sizes.cumsum()
    source = Tokens(np.zeros(ends[-1], np.uint16), ends - sizes, ends)
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    refuses(lambda: pack(dict.fromkeys(weights, source), weights, 1290, 128, 0, 0.1),
            "--long_share 0.1")


def test_the_end_of_the_tokens():
    """Of 4 + 3 + 3 tokens: the cut falls into a document, between two, or after none of them."""
    docs = mixture.tokenize(["abc", "de", "fg"], Letters())
    for share, first, last in ((0.5, [(0, 4), (4, 5)], [(5, 7), (7, 10)]),
                               (0.3, [(0, 4), (4, 7)], [(7, 10)]),
                               (0.0, [(0, 4), (4, 7), (7, 10)], [])):
        parts = docs.split_end(share)
        bounds = [list(zip(d.starts.tolist(), d.ends.tolist(), strict=True)) for d in parts]
        assert bounds == [first, last] and all(d.ids is docs.ids for d in parts)
