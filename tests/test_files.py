"""lib/files.py: files that are whole or absent, errors with file and line.
R numbers: docs/requirements.md."""
import gzip
from pathlib import Path

import pytest

from lib import files
from lib.args import InputError
from lib.files import read_jsonl


def test_jsonl_round_trip_with_line_numbers(tmp_path):
    rows = [{"text": "a\nb\u2028c \"é🙂\""}, {"n": 1.5}]
    files.write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "x.jsonl")] == rows
    with gzip.open(tmp_path / "x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"a": 1}\n\n  \n{"b": 2}')
    assert list(read_jsonl(tmp_path / "x.jsonl.gz")) == [(1, {"a": 1}), (4, {"b": 2})]


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", b'{"a": 1}\n{"a": }\n', "x.jsonl:2: not JSON"),
    ("x.jsonl", b'{"a": 1}\n\n[1]\n', "x.jsonl:3: each line must be a JSON object"),
    ("x.jsonl", b'{"a": "\xff"}\n', "x.jsonl: cannot be read as UTF-8"),
    ("x.jsonl.gz", b'{"a": 1}\n', "x.jsonl.gz: cannot be read"),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "x.jsonl.gz: cannot be read"),
    ("x.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99, "x.jsonl.gz: cannot be read"),
    ("x.jsonl", None, "x.jsonl: no such file")])
def test_bad_jsonl_names_file_and_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_jsonl(tmp_path / name))
    assert "\n" not in str(error.value)


def test_bad_json_names_the_file(tmp_path):
    for content in ("{", "[]", "\udcff"):
        (tmp_path / "x.json").write_text(content, errors="surrogateescape")
        with pytest.raises(InputError, match="x.json: "):
            files.read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """R4.4."""
    path = tmp_path / "deep" / "file"
    files.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \ud800")  # fails half-way: a bug keeps its traceback
    assert path.read_text() == "old"

    def full(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("ne")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="file: cannot be written .No space left on device.; what"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]
