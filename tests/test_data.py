"""python -m data: the whole run, its report, its test items, flat memory."""
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import PROSE, filler, nonsense, refuses, write_rows

import data.__main__
import data.documents
import tasks.queries
from lib.args import InputError, parse_args


def test_run_on_the_builtin_corpus(tmp_path, fake_tasks, capsys):
    args = dict(out=str(tmp_path / "d"), max_mb=0.5, synthetic_mb=0.05)
    result = data.__main__.main(data.__main__.Args(**args))
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report == json.loads(json.dumps(result))
    counts = report["sources"].values()
    assert sum(s["documents"] for s in counts) == sum(s["kept"] for s in counts) + sum(
        report["dropped"].values())
    assert report["dropped"]["contaminated"] == 1      # the planted test prompt
    for name, row in report["sources"].items():
        lines = list(data.documents.read_documents(tmp_path / "d" / f"{name}.jsonl"))
        assert len(lines) == row["kept"] and all(d["source"] == name for d in lines)
    shown = capsys.readouterr().out
    assert "stdlib_reference" in shown and "contaminated" in shown
    with pytest.raises(InputError, match="--overwrite"):
        data.__main__.main(data.__main__.Args(**args))
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": f"{PROSE} {i} {'xyz' * i}"}) + "\n" for i in range(30)))
    again = data.__main__.main(
        data.__main__.Args(
            out=args["out"], input=str(tmp_path / "in.jsonl"), overwrite=True, evals=""
        )
    )
    # near-duplicates of one another; and nothing of the former run is left behind
    assert again["sources"]["in"]["kept"] == 1 and again["dropped"]["duplicate"] == 29
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["in.jsonl", "report.json"]


def test_every_contaminated_document_is_listed(tmp_path, fake_tasks):
    """R2.4: of other reasons report.json has 20 samples, of this one all, with the test item."""
    (item,), r = [query["prompt"] for query in fake_tasks.load("test")], random.Random(1)
    planted = [" ".join([*nonsense(r, 9), item]) for _ in range(25)]
    texts = planted + [" ".join(nonsense(r, 30))]
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": text, "kind": "synthetic"}) + "\n" for text in texts))
    result = data.__main__.main(
        data.__main__.Args(out=str(tmp_path / "d"), input=str(tmp_path / "in.jsonl"))
    )
    listed = result["samples"]["contaminated"]
    assert [row["text"] for row in listed] == [text[:200] for text in planted]
    assert all(item[:60] in row["reason"] for row in listed)


def test_test_items_come_without_our_words_around_them(tmp_path):
    """Else 16 words of an instruction count among the 0.6 of a short item that must be found."""
    rows = [{"prompt": "def f(x):\n", "test": "def check(f): pass", "entry_point": "f"},
            {"text": "Double it.", "code": "", "test_list": ["assert f(1) == 2", "assert f"]},
            {"prompt": [{"role": "user", "content": "How many?"}], "domain": "logic",
             "check": {"kind": "math", "answer": "3"}}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data.__main__.load_tests(f"{tmp_path / 't.jsonl'},") == [
        "def f(x):\n", "Double it.\nassert f(1) == 2", "How many?"]


def test_a_file_name_that_is_no_utf_8_stands_in_the_report(tmp_path):
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    source.write_text(json.dumps({"text": PROSE}) + "\n")
    data.__main__.main(data.__main__.Args(input=f"{source}", out=f"{tmp_path / 'out'}", evals=""))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["args"]["input"] == f"{source}"


def test_an_out_that_overlaps_with_an_input_is_refused(tmp_path):
    """As itself, around it or inside it; --overwrite would delete what is to be read."""
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    (run / "report.json").write_text("{}")
    (run / "in.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    for given, out in ((run, run), (run / "in.jsonl", run), (run, run.parent), (run, run / "b"),
                       (run, tmp_path / "a" / "." / "run")):
        args = data.__main__.Args(input=f"{given}", out=f"{out}", evals="", overwrite=True)
        tests = replace(args, input=f"{tmp_path / 'other.jsonl'}", evals=f"{given}")
        refuses(lambda args=args: data.__main__.main(args), "overlaps")
        refuses(lambda args=tests: data.__main__.main(args), "overlaps")
    assert (run / "in.jsonl").exists() and (run / "report.json").exists()


def test_what_a_killed_run_left_does_not_stay(tmp_path):
    """It is refused without --overwrite, and gone with it; a training run is never touched."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("old.jsonl", "old.train.bin", "old.train.ends", "new.jsonl.tmp"):
        (out / name).write_text("")
    args = data.__main__.Args(input=f"{tmp_path / 'in.jsonl'}", out=f"{out}", evals="")
    refuses(lambda: data.__main__.main(args), "--overwrite")
    data.__main__.main(replace(args, overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == ["in.jsonl", "report.json"]
    (out / "run.json").write_text("{}")
    refuses(lambda: data.__main__.main(replace(args, overwrite=True)), "training run")


def test_a_document_is_no_duplicate_of_a_contaminated_one(tmp_path, fake_tasks):
    """The first holds the test item and is dropped; the second, nearly the same, does not."""
    (item,), r = [query["prompt"] for query in fake_tasks.load("test")], random.Random(1)
    words = ["".join(r.choices("abdefilmorstu", k=7)) for _ in range(600)]
    page = " ".join(" ".join(["The", *words[i:i + 9]]) + "." for i in range(0, 600, 9))
    write_rows(tmp_path / "in.jsonl", [{"text": f"{page} {item}"}, {"text": page}])
    result = data.__main__.main(
        data.__main__.Args(out=str(tmp_path / "d"), input=str(tmp_path / "in.jsonl")))
    assert result["dropped"] == {"contaminated": 1} and result["sources"]["in"]["kept"] == 1


def test_as_many_test_items_are_kept_out_as_are_asked():
    """evaluate.py asks 480 queries of a built-in split."""
    asked = tasks.queries.load("test", built_in=480)
    assert data.__main__.load_tests("test") == [query["prompt"] for query in asked]


def test_arguments():
    assert (
        parse_args(data.__main__.Args, ["--show_dropped", "3", "--max_mb", "1"]).show_dropped == 3
    )


PEAK = """
import json, sys
import data.__main__, lib.run
data.__main__.main(data.__main__.Args(out=sys.argv[2], input=sys.argv[1], evals="", overwrite=True))
print("PEAK", lib.run.peak_rss_mb())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(shared, tmp_path):
    """8 and 32 MB: four times the documents, the same peak. LOAD_MB=2000 compares 100 and 2,000."""
    peaks, most = [], int(os.environ.get("LOAD_MB", "32"))
    for size in (min(most // 4, 100), most):
        with open(tmp_path / "in.jsonl", "w", encoding="utf-8") as file:
            for text in filler(shared, size * 1_000_000):
                file.write(json.dumps({"text": text}) + "\n")
        done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "in.jsonl", tmp_path / "out"],
                              cwd=Path(data.__file__).parents[1], capture_output=True, text=True)
        peaks.append(float(done.stdout.split("PEAK")[1]))
    assert peaks[1] - peaks[0] < 24, peaks                 # SQLite's cache is 32 MB
