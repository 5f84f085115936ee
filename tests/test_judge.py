"""judge.py: the expectation against one whole prompt at a time, a server that answers by the same
model, replies written by hand, the labels and the critics that are made from scores."""
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import letter_queries, refuses, stage_args, teach_letters, write_rows

import tasks.__main__
from data import label
from data.judge import RUBRICS, Judge, chat, expected_score
from data.pairs import CRITERIA, PairFile
from sample import load_policy

TEXTS = ("A short text.", "  :) \n", "one two three four five six " * 40)


def test_the_rubric_file_is_complete():
    """What 1, 3 and 5 mean, and two scored examples, for four criteria and the report's six."""
    assert list(RUBRICS) == ["documents", "answers"] and len(RUBRICS["documents"]) == 4
    assert tuple(RUBRICS["answers"]) == CRITERIA
    for criteria in RUBRICS.values():
        for criterion in criteria.values():
            assert list(criterion["anchors"]) == ["1", "3", "5"]
            (low, bad), (high, good) = criterion["examples"]
            assert bad < good and {bad, good} <= set("12345") and low != high
            messages = chat(criterion, " text ")
            roles = [message["role"] for message in messages]
            assert roles == ["system"] + ["user", "assistant"] * 2 + ["user"]
            assert messages[-1]["content"] == "Text: text"
            parts = [criterion["question"], *criterion["anchors"].values()]
            assert all(part in messages[0]["content"] for part in parts)


def test_the_score_is_the_expectation_over_the_score_tokens(micro_run):
    """A prompt per criterion, against the probabilities of the whole vocabulary."""
    model, tokenizer = load_policy(micro_run, "cpu")
    scorer = Judge(str(micro_run), max_chars=80)
    for text in TEXTS:
        for rubric in RUBRICS:
            got = scorer.score(rubric, text)
            assert list(got) == list(RUBRICS[rubric])
            for name, criterion in RUBRICS[rubric].items():
                ids, _ = tokenizer.render(chat(criterion, text[:80]), True)
                probs = model(torch.tensor([ids]))[0, -1].softmax(-1)
                p = [probs[tokenizer.encode(d)[0]].item() for d in "12345"]
                want = sum(i * x for i, x in enumerate(p, 1)) / sum(p)
                assert got[name] == pytest.approx(want, abs=1e-4) and 1 < got[name] < 5
            assert len({round(score, 5) for score in got.values()}) == len(got)


def test_scores_rank_finely_under_autocast(micro_run):
    """In bfloat16, scores near 3 would have steps of 1/64."""
    scorer = Judge(str(micro_run))
    with torch.autocast("cpu", torch.bfloat16):
        scores = [scorer.score("answers", text)["relevance"] for text in TEXTS]
    assert any(score * 64 != round(score * 64) for score in scores)


# ---------------------------------------------------------------------------------------------
# a server

@pytest.fixture
def server(micro_run):
    """A chat server that answers by the model of micro_run. `spoil` changes its replies."""
    model, tokenizer = load_policy(micro_run, "cpu")
    names = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": "the-model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.asked.append((self.path, body, self.headers["Authorization"]))
            ids, _ = tokenizer.render(body["messages"], True)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1).tolist()
            top = [{"token": name, "logprob": logprob}
                   for name, logprob in zip(names, logprobs, strict=False)]
            self.send(http.spoil({"choices": [{
                "index": 0, "finish_reason": "length",
                "message": {"role": "assistant", "content": "3"},
                "logprobs": {"content": [{"token": "3", "logprob": -1.0, "top_logprobs": top}]}}]}))

        def send(self, reply):
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.asked, http.spoil = [], lambda reply: reply
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_a_server_gives_the_scores_of_its_model(micro_run, server, monkeypatch):
    """One request per criterion, in OpenAI's form; the key comes from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    want = Judge(str(micro_run)).score("documents", TEXTS[0])
    assert Judge("", server.url).score("documents", TEXTS[0]) == pytest.approx(want, abs=1e-4)
    assert len(server.asked) == 4
    for path, body, key in server.asked:
        assert path == "/v1/chat/completions" and key == "Bearer sk-test"
        assert body["model"] == "the-model" and body["logprobs"] and body["max_tokens"] == 1
    Judge("large", server.url).score("documents", "x")
    assert server.asked[-1][1]["model"] == "large"


def reply(**logprobs):
    top = [{"token": token, "logprob": math.log(p)} for token, p in logprobs.items()]
    return {"choices": [{"message": {"content": "I cannot"},
                         "logprobs": {"content": [{"top_logprobs": top}]}}]}


def test_replies_by_hand():
    """Only the digits count, with and without a space: (0.5 * 4 + 0.25 * 5 + 0.05 * 1) / 0.8."""
    likeliest = {"4": 0.3, " 4": 0.2, "5": 0.25, "1": 0.05, "The": 0.1, "45": 0.1}
    assert expected_score(reply(**likeliest)) == pytest.approx(3.3 / 0.8)
    refuses(lambda: expected_score(reply(I=0.9, The=0.1)), "--judge_url", "1 to 5", "I cannot")


def test_a_broken_server_is_told_in_one_line(server):
    server.spoil = lambda reply: {"choices": [{"message": {"content": "4"}, "logprobs": None}]}
    refuses(lambda: Judge("", server.url).score("documents", "x"), "--judge_url", "TypeError")
    refuses(lambda: Judge("", "localhost"), "--judge_url must be")


# ---------------------------------------------------------------------------------------------
# what is made from scores

def test_labels_from_scores_by_hand():
    """A gap below 0.05 is a tie; the verdict is that of the mean of the six gaps."""
    chosen = dict(zip(CRITERIA, (3.0, 2.0, 4.0, 3.0, 5.0, 3.02), strict=True))
    rejected = dict(zip(CRITERIA, (2.0, 4.0, 4.0, 3.1, 5.0, 3.0), strict=True))
    assert label.compare(chosen, rejected) == {"verdict": "rejected", "criteria": dict(zip(
        CRITERIA, ("chosen", "rejected", "tie", "rejected", "tie", "tie"), strict=True))}


def test_a_judge_labels_what_is_left_and_its_labels_reach_the_pairs(micro_run, server, tmp_path,
                                                                    capsys):
    """The server's and the directory's labels are the same; a second start goes on; --write."""
    pairs = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": [{"role": "user", "content": f"Is {i} even?"}], "chosen": "yes",
         "rejected": "no, never"} for i in range(3)])
    out = tmp_path / "labels.jsonl"
    args = stage_args(label, pairs=pairs, out=str(out), judge=str(micro_run))
    label.main(args)
    rows = [json.loads(line) for line in out.open()]
    assert len({row["pair"] for row in rows}) == 3
    assert all(tuple(row["criteria"]) == CRITERIA for row in rows)
    scorer = Judge(str(micro_run))
    for row, (_, pair) in zip(rows, sorted(label.by_id(pairs).items()), strict=True):
        sides = [scorer.score("answers", f"user: {pair['prompt'][0]['content']}\nAnswer: {answer}")
                 for answer in ("yes", "no, never")]
        assert {"pair": row["pair"]} | label.compare(*sides) == row
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    label.main(stage_args(label, pairs=pairs, out=str(out), judge_url=server.url))
    assert [json.loads(line) for line in out.open()] == rows and len(server.asked) == 12
    written = tmp_path / "written.jsonl"
    label.main(stage_args(label, pairs=pairs, report=str(out), write=str(written)))
    assert "A preferred in none" in capsys.readouterr().out
    for pair in PairFile(str(written)):
        assert set(pair["criteria"]) == {"overall", *CRITERIA}
        assert pair["criteria"]["overall"] >= 0.5


def test_only_what_all_critics_approve_of_is_kept(tokenizer, tmp_path, monkeypatch):
    """One critic likes "A.", the other "B." and "A."; no criterion may fall below 3."""
    likes = {"one": {"A.": 3.0, "B.": 2.9}, "two": {"A.": 4.0, "B.": 4.0}}

    class Critic(Judge):
        def __init__(self, name, url, device):
            self.name = name

        def score(self, rubric, text):
            question, answer = text.split("\nAnswer: ")
            assert rubric == "answers" and question in ("Pick A.", "Choose A.")
            return {"truthfulness": 5.0, "relevance": likes[self.name].get(answer, 1.0)}
    monkeypatch.setattr(tasks.__main__, "Judge", Critic)
    policy = str(teach_letters(tokenizer, tmp_path / "policy"))
    queries = letter_queries(tmp_path / "queries.jsonl", ".")
    kept = {}
    for critics in ("", "two", "two,one"):
        out = tmp_path / "kept.jsonl"
        tasks.__main__.rejection(stage_args(
            tasks.__main__, init=policy, queries=queries, responses=16, max_new_tokens=8,
            out=str(out), critics=critics))
        kept[critics] = {json.loads(line)["messages"][1]["content"] for line in out.open()}
    assert kept["two"] == {"A.", "B."} <= kept[""] and kept["two,one"] == {"A."}
