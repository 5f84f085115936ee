"""data/documents.py: every format that is read, and broken files named with their line."""
import gzip
import json

import pytest

import data.documents
from lib.args import InputError


def test_reads_text_and_jsonl(tmp_path):
    (tmp_path / "book.txt").write_text("one\n<|endoftext|>\n\ntwo\nlines <|endoftext|> inside\n")
    texts = [d["text"].strip() for d in data.documents.read_documents(tmp_path / "book.txt")]
    assert texts == ["one", "two\nlines <|endoftext|> inside"]
    with gzip.open(tmp_path / "web.jsonl.gz", "wt") as file:
        file.write('{"text": "a", "id": 3}\n\n')
        file.write('{"text": "b", "source": "x/../y.z", "kind": "code"}\n')
    assert list(data.documents.read_documents(tmp_path / "web.jsonl.gz")) == [
        {"text": "a", "source": "web", "kind": "prose"},
        {"text": "b", "source": "x____y_z", "kind": "code"}]
    (tmp_path / "skipped.md").write_text("no document")
    for name in ("report.json", "merges.txt"):  # of a data directory with a tokenizer
        (tmp_path / name).write_text("no document")
    found = data.documents.read_all(f"{tmp_path},{tmp_path / 'book.txt'}")
    assert [d["source"] for d in found] == [tmp_path.name] * 3 + ["x____y_z", "book", "book"]


@pytest.mark.parametrize("names", ["", "{0},", ",{0}", "{0},,{0}"])
def test_an_empty_name_is_not_the_working_directory(tmp_path, names):
    (tmp_path / "book.txt").write_text("one")
    with pytest.raises(InputError, match="no name"):
        list(data.documents.read_all(names.format(tmp_path / "book.txt")))


def test_a_separator_line_is_no_text(tmp_path):
    """Nor is its line end; lines with more on them are text, and \\r\\n ends a line as \\n does."""
    (tmp_path / "a.txt").write_bytes(
        b"<|endoftext|>\na\n\nb\n<|endoftext|>  \r\nc\r\n<|endoftext|>d\n<|endoftext|>")
    texts = [d["text"] for d in data.documents.read_documents(tmp_path / "a.txt")]
    assert texts == ["a\n\nb\n", "c\n<|endoftext|>d\n"]


ROWS = [{"text": "One é."}, {"text": "Another \U0001f600."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.Json"])
@pytest.mark.parametrize("content", [LINES, ARRAY, BOM + LINES, b" \n" + ARRAY, BOM + ARRAY])
def test_a_byte_order_mark_an_array_and_capitals_change_nothing(tmp_path, name, content):
    want = [row | {"source": name[0], "kind": "prose"} for row in ROWS]
    (tmp_path / name).write_bytes(content)
    assert list(data.documents.read_documents(tmp_path / name)) == want
    (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(content))
    assert list(data.documents.read_documents(tmp_path / f"{name}.GZ")) == want


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "é\n".encode())
    assert [d["text"] for d in data.documents.read_documents(tmp_path / "a.txt")] == ["é\n"]


@pytest.mark.parametrize("name,content,match", [
    ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", '{"text": "x"}\n{"content": "y"}\n', r'a\.jsonl:2: "text" must be a string'),
    ("a.jsonl", '{"text": 3}\n', r'a\.jsonl:1: "text"'),
    ("a.jsonl", '{"text": "x", "kind": "poem"}\n', r'a\.jsonl:1: "kind"'),
    ("a.txt", b"\xff\xfe\x00", r"a\.txt: cannot be read as UTF-8"),
    ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be read"),
    ("a.csv", "x", r"a\.csv: no directory"),
    ("a.json", '[{"text": "x"},\n 5]', r"a\.json:2: each line"),
    ("a.json", '[{"text": "x"},\n{"text"]', r"a\.json:2: not JSON"),
    ("a.json", "[" * 100_000, r"a\.json:1: cannot be read"),
    ("a.json.gz", gzip.compress(b'[{"text": "x"}]', mtime=0)[:-9], r"a\.json\.gz: cannot be read"),
])
def test_broken_input_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=match):
        list(data.documents.read_documents(tmp_path / name))
    with pytest.raises(InputError, match="no such file"):
        list(data.documents.read_documents(tmp_path / "absent.jsonl"))
