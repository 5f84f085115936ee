"""label.py: each reason of the review, a session at a real terminal, what a crash leaves, agreement
by hand."""
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from helpers import refuses, write_rows

from data import label
from data.label import Args, by_id, draw, judge, text_of
from data.pairs import review

PAIRS = [{"prompt": f"Is {i} even?", "chosen": f"yes, {i}", "rejected": f"no, {i}"}
         for i in range(6)]


# ---------------------------------------------------------------------------------------------
# by programs

def test_each_reason_drops_its_pair(tokenizer):
    """One pair for each reason, between good ones; the reasons that were not asked for drop none.
    """
    def pair(chosen, rejected, prompt="p"):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    pairs = [pair("good one", "bad"), pair("word " * 200, "w"), pair(" ", "b"), pair("c", "c"),
             pair("bad", "good one"), pair("good one", "bad"), pair("good one", "bad", "other p"),
             pair("half \ufffd", "whole"), pair("```\nx = 1", "x = 1"),
             pair("```\nx = 1\n```", "y = 1")]
    kept, rows, dropped = review(pairs, tokenizer, 120)
    assert list(kept) == [pairs[i] for i in (0, 6, 7, 8, 9)]
    assert dropped == {"too long": 1, "empty chosen answer": 1, "equal answers": 1,
                       "seen before, or its opposite": 2}
    _, chosen, rejected, label = rows[0]
    assert label == 1
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == (
        "good one<|im_end|>", "bad<|im_end|>")
    opposite = [pair(" ", "good"), pair("good", " "), pair(" ", "good")]
    assert list(review(opposite, tokenizer, 120).pairs) == opposite[1:2]
    kept, _, dropped = review(pairs, tokenizer, 120, check_format=True)
    assert list(kept) == [pairs[i] for i in (0, 6, 9)]
    assert {reason: dropped[reason] for reason in list(dropped)[4:]} == {
        "ill-formed chosen answer": 2}


# ---------------------------------------------------------------------------------------------
# by people

@pytest.fixture
def session(tmp_path, monkeypatch, capsys):
    """session(keys): each key is a line from a pipe. -> what the run showed, all labels."""
    def session(typed, pairs=PAIRS, out="labels.jsonl", seed=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
        label.main(Args(pairs=write_rows(tmp_path / "pairs.jsonl", pairs),
                        out=str(tmp_path / out), seed=seed))
        rows = [json.loads(line) for line in (tmp_path / out).open(encoding="utf-8")]
        return capsys.readouterr().out, rows
    return session


def test_verdicts_are_of_the_pair_and_not_of_the_place():
    """a is what A was; a criterion's small letter is A's, its capital B's; other letters mean
    nothing; no letter is no verdict."""
    assert judge(iter(["tHz a"]), "rejected", "chosen") == {
        "verdict": "rejected", "criteria": {"truthfulness": "rejected", "helpfulness": "chosen"}}
    assert judge(iter(["cC", "b"]), "rejected", "chosen") == {
        "verdict": "chosen", "criteria": {"conciseness": "chosen"}}
    assert judge(iter(["="]), "chosen", "rejected")["verdict"] == "tie"
    assert judge(iter(["t\x1b"]), "chosen", "rejected") == {"verdict": "quit"}


def test_a_session_is_blind_shuffled_and_goes_on(session, tmp_path):
    """Nothing on the screen tells the label; both orders come up; a second session shows only what
    is left."""
    screen, rows = session("ab=q")
    assert "chosen" not in screen and "rejected" not in screen
    assert [row["verdict"] == row["a"] for row in rows] == [True, False, False]
    assert rows[2]["verdict"] == "tie"
    screen, rows = session("xaaaaaaaa")
    assert screen.startswith("3 of 6 pairs are labelled") and "pairs left: 0" in screen
    assert len({row["pair"] for row in rows}) == 6 and len(rows) == 6
    assert rows[3]["verdict"] == "skip" and {row["a"] for row in rows} == {"chosen", "rejected"}
    assert session("a")[1] == rows  # nothing is left to show
    ids = [row["pair"] for row in rows]
    assert ids != sorted(ids) and set(ids) == by_id(str(tmp_path / "pairs.jsonl")).keys()


def test_the_order_is_a_function_of_seed_and_pair(session, tmp_path):
    """The same seed and name show the same pairs in the same places, whatever the file's order;
    another seed does not, nor does another person's file: two who always press A do not agree."""
    pairs = [{"prompt": f"q{i}", "chosen": "c", "rejected": "r"} for i in range(20)]
    shown = [[(row["pair"], row["a"]) for row in session("a" * 20, some, out, seed)[1]]
             for some, out, seed in ((pairs, "1", 0), (pairs[::-1], "1", 0), (pairs, "1", 1),
                                     (pairs, "2", 0)) if not (tmp_path / out).unlink(True)]
    assert shown[0] == shown[1] and dict(shown[0]) != dict(shown[2])
    assert 3 < sum(dict(shown[3])[pair] == a for pair, a in shown[0]) < 17
    assert 300 < sum(draw(0, str(i)) % 2 for i in range(700)) < 400


def test_half_a_line_is_cut_off(session, tmp_path):
    """What a full disk or a lost machine left of the last label goes; the labels before it stay."""
    _, rows = session("ab")
    path = tmp_path / "labels.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    screen, again = session("b")
    assert screen.startswith("1 of 6") and again[0] == rows[0]
    assert again[1]["pair"] == rows[1]["pair"]


@pytest.mark.parametrize("content", [
    '[{"pair": "a"}]', "notes", '{"prompt": "p"}\n', '{"pair": "a"}\n5\n', '{"pair": "a"}\n{"prom',
    '{"pair": [1]}\n', '{"pair": "a"}\n{"text": "b"}\n{"pair": "a'])
def test_a_file_of_anything_but_labels_stays_as_it_is(session, tmp_path, content):
    (tmp_path / "mine").write_text(content)
    refuses(lambda: session("a", out="mine"), "mine")
    assert (tmp_path / "mine").read_text() == content


@pytest.mark.parametrize("torn", ["{", '{"pa', '{"pair": "3f'])
def test_the_first_label_may_be_torn(session, tmp_path, torn):
    (tmp_path / "mine").write_text(torn)
    assert len(session("aq", out="mine")[1]) == 1


def test_labels_are_not_appended_to_the_pairs(session, tmp_path):
    refuses(lambda: session("a", out="./pairs.jsonl"), "--pairs")
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 6


def test_a_line_judges_one_pair(session):
    """The rest would judge a pair that nobody has seen."""
    typed = ["aa", "b="]
    assert [row["verdict"] == row["a"] for row in session(typed)[1]] == [True, False]


def test_pairs_with_other_tools_are_other_pairs(tmp_path):
    """Without tools an id is what it always was."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    rows = [PAIRS[0], PAIRS[0] | {"tools": tools[:1]}, PAIRS[0] | {"tools": tools[1:]}]
    ids = list(by_id(write_rows(tmp_path / "pairs.jsonl", rows)))
    assert len(ids) == 3 and ids[0] == "c6b3ff17d18dd19f"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="terminals of Unix")
def test_a_session_at_a_terminal(tmp_path):
    """Each label is on disk before the next pair is shown."""
    ours, theirs = os.openpty()
    path = tmp_path / "labels.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "data.label", "--out", path, "--pairs",
         write_rows(tmp_path / "pairs.jsonl", PAIRS)], stdin=theirs, stdout=subprocess.DEVNULL,
        cwd=ROOT)
    deadline = time.time() + 60
    for n, keys in enumerate((b"a\n", b"hb\n"), 1):
        os.write(ours, keys)
        while time.time() < deadline and (
                not path.exists() or path.read_bytes().count(b"\n") < n):
            time.sleep(0.02)
    os.write(ours, b"q\n")
    assert process.wait(60) == 0 and len(path.read_text().splitlines()) == 2
    os.close(ours), os.close(theirs)


def test_an_answer_cannot_write_on_the_terminal(tmp_path):
    """Escape sequences, carriage returns and overrides of the writing direction are shown as such.
    """
    pairs = [{"prompt": "p", "chosen": "a\x1b[2Jb\rc", "rejected": "\u202ed\te"}]
    said = subprocess.run(
        [sys.executable, "-m", "data.label", "--out", tmp_path / "out.jsonl", "--pairs",
         write_rows(tmp_path / "pairs.jsonl", pairs)], input="q", text=True, check=True,
        stdout=subprocess.PIPE, cwd=ROOT).stdout
    assert "a\\x1b[2Jb\\rc" in said and "\\u202ed\te" in said
    assert text_of([{"role": "user", "content": "Hi"}]) == "user: Hi"
    assert text_of([{"role": "assistant", "content": ""}]) == "assistant: "


# ---------------------------------------------------------------------------------------------
# report

def labels(tmp_path, name, verdicts):
    """A label file: a verdict for each of PAIRS, None for none; A was always the chosen one."""
    ids = list(by_id(write_rows(tmp_path / "pairs.jsonl", PAIRS)))
    return write_rows(tmp_path / name, [
        {"pair": pair, "a": "chosen", "verdict": verdict, "criteria": {"helpfulness": "chosen"}}
        for pair, verdict in zip(ids, verdicts, strict=True) if verdict])


def test_report_and_majority(tmp_path, capsys):
    """Shares by hand; --write adds the mean votes, a tie is half a vote; it turns what most see the
    other way, drops what is to be skipped, and keeps what nobody saw."""
    files = [labels(tmp_path, "one", ["chosen", "rejected", "tie", "chosen", "skip", None]),
             labels(tmp_path, "two", ["chosen", "rejected", "tie", "rejected", "skip", None]),
             labels(tmp_path, "three", ["rejected", "rejected", "chosen", None, "chosen", None])]
    label.main(Args(pairs=str(tmp_path / "pairs.jsonl"), report=",".join(files),
                    write=str(tmp_path / "out.jsonl")))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (f"{files[0]}: agrees with the automatic label in 66.7% of 3; 2 ties or "
                       "skipped; A preferred in 66.7% of 3")
    assert told[1] == "  by helpfulness: with the label in 100.0% of 5"
    assert told[6].startswith(f"{files[0]} and {files[1]}: agree in 80.0% of 5")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert out[1] == {"prompt": "Is 1 even?", "chosen": "no, 1", "rejected": "yes, 1",
                      "criteria": {"overall": 1.0, "helpfulness": 0.0}}
    assert [row["prompt"] for row in out] == [PAIRS[i]["prompt"] for i in (0, 1, 2, 3, 5)]
    votes = [(row["criteria"]["overall"], row["criteria"]["helpfulness"]) for row in out[:4]]
    assert votes == [pytest.approx(pair) for pair in ((2 / 3, 1), (1, 0), (2 / 3, 1), (0.5, 1))]
    assert out[0] | PAIRS[0] == out[0] and out[4] == PAIRS[5]
    assert told[-1].endswith("out.jsonl: 5 of 6 pairs")


def test_labels_of_other_pairs_are_refused(tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "x", "chosen": "c", "rejected": "r"}])
    mine = labels(tmp_path, "one", ["chosen"] * 6)
    refuses(lambda: label.main(Args(pairs=other, report=mine)), mine, other)


@pytest.mark.parametrize("change", [{"verdict": None}, {"verdict": ["tie"]}, {"criteria": None},
                                    {"verdict": "A"}, {"criteria": {"helpfulness": "yes"}}])
def test_a_label_without_verdict_or_criteria_is_refused(tmp_path, change):
    """A line whose pair is no text is of no pair."""
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    mine = labels(tmp_path, "one", ["chosen"] * 6)
    rows = [json.loads(line) for line in Path(mine).read_text("utf-8").splitlines()]
    write_rows(Path(mine), [{"pair": [1]}, rows[0], rows[1] | change])
    refuses(lambda: label.main(Args(pairs=pairs, report=mine)), f"{mine}:3")
