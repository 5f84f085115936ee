"""python -m tasks: conversations for SFT whose answers passed their checks."""
import json
from types import SimpleNamespace

from helpers import letter_queries, refuses, stage_args, teach_letters

import tasks.queries
from tasks import __main__ as program


def test_demonstrations_are_written(tmp_path):
    """The file holds exactly the rows of demonstrations(n, seed), in order."""
    path = tmp_path / "rows.jsonl"
    program.demonstrations(stage_args(program, n=8, seed=2, out=str(path)))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == tasks.queries.demonstrations(8, 2)
    refuses(lambda: program.demonstrations(stage_args(program, n=8)), "--out")


def test_rejection_sampling_keeps_what_passes(tokenizer, tmp_path):
    """A policy that says "A." or "B.": what is kept is right, and each conversation is there once;
    nothing is written where nothing passes."""
    policy = str(teach_letters(tokenizer, tmp_path / "policy"))
    queries = letter_queries(tmp_path / "queries.jsonl")
    path = tmp_path / "rows.jsonl"
    values = {"init": policy, "queries": queries, "responses": 16, "max_new_tokens": 8}
    program.rejection(stage_args(program, out=str(path), **values))
    rows = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    said = [(user["content"], assistant["content"]) for user, assistant in rows]
    assert {question for question, _ in said} == {"Pick A.", "Choose A."}
    assert all("a" in text.lower() for _, text in said) and len(set(said)) == len(said)
    path.unlink()
    values["queries"] = letter_queries(tmp_path / "never.jsonl", "never said")
    refuses(lambda: program.rejection(stage_args(program, out=str(path), **values)), "passes")
    assert not path.exists()


def test_rejection_sampling_of_messages(monkeypatch):
    """The conversation continues the messages; equal responses to one prompt are there once."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    query = {"prompt": prompt, "domain": "mathematics", "check": {"kind": "math", "answer": "5"}}
    answers = [SimpleNamespace(query=query, text=text, score=score, ids=[number])
               for number, (text, score) in enumerate(
                   [("5.", 1.0), ("6.", 0.0), ("5.", 1.0), ("Five.", 1.0)])]
    monkeypatch.setattr(program, "rollout", lambda *args, **kwargs: [answers])
    rows = program.rejection_sample(None, None, [query], 4, 8, 0)
    assert rows == [{"messages": [*prompt, {"role": "assistant", "content": text}]}
                    for text in ("5.", "Five.")]
