"""lib/files.py: files that are whole or absent, errors with file and line.
R numbers: docs/requirements.md."""
import gzip
import json
import os
from pathlib import Path

import pytest

from lib import files
from lib.args import InputError
from lib.files import read_jsonl


def test_jsonl_round_trip_with_line_numbers(tmp_path):
    rows = [{"text": "a\nb\u2028c \"é🙂\""}, {"n": 1.5}, {"half": "\ud83d"}]
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


def test_an_array_is_read_as_its_items(tmp_path):
    """The items are json.load's; an array that is cut off or goes on is refused."""
    rows = [{"a": "], {\\\"["}, {}, {"b": [1.5, {"c": None}], "é": "\u2028🙂"}, {"n": -1}]
    path = tmp_path / "x.json"
    for indent in (None, 0, 3):
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        for space in ("", "\n \n"):
            path.write_text(20 * space + text + 20 * space, encoding="utf-8")
            assert list(read_jsonl(path)) == list(enumerate(rows, 1))
        for end in range(1, len(text)):
            path.write_text(text[:end], encoding="utf-8")
            with pytest.raises(InputError, match=r"x.json:\d+: not JSON"):
                list(read_jsonl(path))
    for wrong, number in (("[{}\n {}]", 2), ("[{},, {}]", 1), ("[{}] {}", 1), ("[{}]]", 1),
                          ("[{}, 5]", 2), ("[[]]", 1), ("[{}, {]", 1), ("[{}}", 1)):
        path.write_text(wrong)
        with pytest.raises(InputError, match=f"x.json:{number}: "):
            list(read_jsonl(path))
    path.write_text(" [ ] ")
    assert list(read_jsonl(path)) == []


def test_a_long_array_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('[{}, {"a": "' + "x" * 1000)
    monkeypatch.setattr(files, "MAX_ARRAY", 1000)
    with pytest.raises(InputError, match="x.json: an array of more than 1,000 characters"):
        list(read_jsonl(path))


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


def test_an_error_without_a_text_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be written .RuntimeError"):
        with files.disk_errors(tmp_path):
            raise RuntimeError


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    """Somebody who may write to the directory links the name that we are about to write to."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run.json.tmp").symlink_to(precious)
    files.write_atomic(tmp_path / "run.json", "new")
    assert precious.read_text() == "mine"
    assert (tmp_path / "run.json").read_text() == "new"
    assert not (tmp_path / "run.json").is_symlink()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_endless_lines_are_refused_before_they_fill_the_memory(tmp_path):
    """A megabyte of gzip may hold a line of a gigabyte; here 130 KB hold one of 130 MB."""
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"a": 1}\n')
        for _ in range(130):
            file.write(b" " * 2**20)
    with pytest.raises(InputError, match="x.jsonl.gz:2: a line of more than 67,108,864"):
        list(read_jsonl(path))
    with pytest.raises(InputError, match="x.jsonl.gz:2: a line of more than 67,108,864"):
        list(files.read_texts(path))
    with gzip.open(path, "wb") as file:  # the longest line that is read
        file.write(b'{"a": 1}' + b" " * (files.MAX_LINE - 9) + b"\n")
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}]
