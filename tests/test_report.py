"""lib/report.py: what it says of stages whose numbers are known, and that report.html needs nothing
but itself."""
import json
from html.parser import HTMLParser

from helpers import refuses, write_rows

from lib import report


def fake_stage(root, name, greedy):
    path = root / name
    scores = root / "evaluation" / name
    for folder in (path, scores):
        folder.mkdir(parents=True)
    cell = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    metrics = {"pass@1": {"total": cell, "logic": cell}, "greedy": {"total": cell, "logic": cell}}
    record = {"seed": 3, "seconds": 60.0, "peak_rss_mb": 100, "command": f"{name}.py --x 1",
              "result": {"loss": 1.0}}
    (path / "run.json").write_text(json.dumps(record), "utf-8")
    evaluation = {"settings": {}, "metrics": metrics, "run": record}
    (scores / "eval.json").write_text(json.dumps(evaluation), "utf-8")
    write_rows(path / "log.jsonl",
               [{"step": i, "loss": 2.0 - i, "pass_rate": i / 9} for i in range(3)])
    write_rows(scores / "eval_samples.jsonl", [
        {"domain": "logic", "prompt": f"q{i}", "check": {"kind": "<math>"}, "greedy": f"{name} <b>",
         "greedy_score": s, "pass@1": s / 2} for i, s in enumerate(greedy)])


def test_report(tmp_path):
    """Stages in order with time, command and intervals; what GRPO learned and lost."""
    fake_stage(tmp_path, "grpo", [1.0, 0.0, 1.0])
    fake_stage(tmp_path, "sft", [0.0, 1.0, 1.0])
    report.main(report.Args(run=str(tmp_path)))
    assert [stage.name for stage in report.collect(tmp_path)] == ["sft", "grpo"]
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "seed 3, 2.0 minutes" in text
    assert text.count("50.0 [25.0, 75.0]") == 8
    assert "| sft | 60 | 100 | 50.0 | 50.0 |" in text
    assert "One question: q0\n\n| stage | its answer |\n| --- | --- |\n| sft | `sft <b>` |" in text
    assert "Learned from sft to grpo: 1 queries" in text and "Lost from sft to grpo: 1" in text
    assert "| q0 |" in text and "| q1 |" in text and "| q2 |" not in text
    assert "`python sft.py --x 1`" in text
    # gains +1, -1 and 0: mean 0, deviation 1, so 1.96 / sqrt(3), in [-1, 1]; half of it sampled
    assert "| sft | grpo | +0.0 [-56.6, +56.6] | +0.0 [-100.0, +100.0] |" in text


def test_gains_are_only_of_the_same_queries(tmp_path):
    """A stage evaluated on other queries is compared with none."""
    rows = [{"prompt": "a", "pass@1": 0.5, "greedy_score": 1.0}]
    assert len(report.gains({"sft": rows, "dpo": rows}).rows) == 1
    assert report.gains({"sft": rows, "dpo": [rows[0] | {"prompt": "b"}]}).rows == []


def test_report_of_nothing_is_refused(tmp_path):
    """One line."""
    refuses(lambda: report.main(report.Args(run=str(tmp_path))), "--run")


def test_one_stage_that_is_not_finished_nor_evaluated(tmp_path):
    """It has its row all the same, and how to evaluate it."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run.json").write_text('{"seed": 0, "command": "sft.py"}', "utf-8")
    report.main(report.Args(run=str(tmp_path)))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| sft | not finished |  |  |  |  |" in text and "| sft | `python sft.py` |" in text
    assert f"python evaluate.py --init {tmp_path}" in text
    assert "not finished" in Page((tmp_path / "report.html").read_text("utf-8")).words


class Page(HTMLParser):
    """Collects the tags, and checks that each is closed."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + "\n"


def test_html_stands_alone_and_escapes(tmp_path):
    """No script, no address, every tag closed; a model's answer is text, never markup."""
    fake_stage(tmp_path, "sft", [0.0, 1.0])
    fake_stage(tmp_path, "grpo", [1.0, 0.0])
    report.main(report.Args(run=str(tmp_path)))
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe"} and "svg" in names
    assert not any("http" in str(attrs) for _, attrs in page.tags)
    assert "grpo <b>" in page.words and "<math>" in page.words
    assert "Learned from sft to grpo: 1 queries" in page.words
    assert "Below the full score after grpo: 1 queries" in page.words


def test_a_strangers_text_is_no_html(tmp_path):
    """The domains and the prompts of a file of queries stand in the page as they are written."""
    evil = "<script>document.title='x'</script>"
    fake_stage(tmp_path, "sft", [0.0])
    fake_stage(tmp_path, "grpo", [1.0])
    for name in ("sft", "grpo"):
        path = tmp_path / "evaluation" / name
        for file in ("eval.json", "eval_samples.jsonl"):
            text = (path / file).read_text("utf-8").replace('"logic"', json.dumps(evil))
            (path / file).write_text(text.replace('"q0"', json.dumps(f"q {evil}")), "utf-8")
    report.main(report.Args(run=str(tmp_path)))
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags} and page.words.count(evil) >= 3


def test_a_curve_has_its_points_where_they_belong():
    """Three steps from 0 to 1: left to right, and the svg's y runs downwards."""
    rows = [{"step": 10, "x": 0.0}, {"step": 20, "x": None}, {"step": 30, "x": 1.0},
            {"step": 50, "x": 0.5}]
    drawn = report.curve(rows, "x")
    assert 'points="0.0,95.0 150.0,5.0 300.0,50.0"' in drawn
    assert "0 → 0.5, from 0 to 1, steps 10–50" in drawn
    assert report.curve(rows[:1], "x") == "" and report.curve(rows, "y") == ""


def test_the_log_of_every_stage_has_its_curves():
    """A renamed metric would vanish from the report without a word."""
    sources = {name: open(f"{name.replace('_control', '').replace('rl_first', 'grpo')}.py").read()
               for name in report.CURVES}
    for stage, metrics in report.CURVES.items():
        for metric in metrics:
            assert f"{metric}=" in sources[stage] or f'"{metric}"' in sources[stage], metric


def test_evaluations_by_different_rewards_are_not_compared(tmp_path):
    for name, reward in (("sft", "mine.py:score 0a"), ("grpo", "mine.py:score 0b")):
        fake_stage(tmp_path, name, [0.0])
        path = tmp_path / "evaluation" / name / "eval.json"
        path.write_text(path.read_text().replace('"settings": {}',
                                                 f'"settings": {{"reward": "{reward}"}}'))
    refuses(lambda: report.main(report.Args(run=str(tmp_path))), "sft and grpo", "--reward")


def test_evaluations_by_different_domains_are_not_compared(tmp_path):
    for name, key in (("sft", ""), ("grpo", "topic")):
        fake_stage(tmp_path, name, [0.0])
        path = tmp_path / "evaluation" / name / "eval.json"
        path.write_text(path.read_text().replace('"settings": {}',
                                                 f'"settings": {{"domain_key": "{key}"}}')
                        .replace("logic", key or "logic"))
    refuses(lambda: report.main(report.Args(run=str(tmp_path))), "sft and grpo", "--domain_key")


def test_the_base_model_has_no_curves(tmp_path):
    """Not even if a log lies there."""
    fake_stage(tmp_path, "base", [0.0])
    report.main(report.Args(run=str(tmp_path)))
    assert "svg" not in {tag for tag, _ in Page((tmp_path / "report.html").read_text("utf-8")).tags}


def test_of_graded_answers_those_that_rose_most_are_shown(tmp_path):
    fake_stage(tmp_path, "sft", [0.2, 0.1, 0.5])
    fake_stage(tmp_path, "grpo", [0.3, 0.9, 0.4])
    report.main(report.Args(run=str(tmp_path)))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "Learned from sft to grpo: 2 queries" in text
    assert "Lost from sft to grpo: 1 queries" in text
    assert "| q1 |" in text and "| q2 |" in text and "| q0 |" not in text


def test_the_base_model_has_a_row_of_its_evaluation_alone(tmp_path):
    """No stage here made it: no run.json, no seconds, and the command is that of its evaluation."""
    fake_stage(tmp_path, "base", [0.0, 0.0])
    fake_stage(tmp_path, "sft", [1.0, 1.0])
    (tmp_path / "base" / "run.json").unlink()
    (tmp_path / "base" / "log.jsonl").unlink()
    path = tmp_path / "evaluation" / "base" / "eval.json"
    settings = '"settings": {"init": "Qwen", "seed": 3}'
    path.write_text(path.read_text().replace('"settings": {}', settings))
    report.main(report.Args(run=str(tmp_path)))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| base |  |  | 50.0 | 50.0 |  |" in text
    assert "| base | `python evaluate.py --init Qwen` |" in text
    assert "| base | sft | +50.0 [+50.0, +50.0] | +100.0 [+100.0, +100.0] |" in text
    assert "seed 3, 1.0 minutes" in text


def test_prompts_that_are_messages_are_shown_as_a_conversation(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a|b?"}]
    for name, score in (("sft", 0.0), ("grpo", 1.0)):
        fake_stage(tmp_path, name, [score])
        path = tmp_path / "evaluation" / name / "eval_samples.jsonl"
        path.write_text(path.read_text("utf-8").replace('"q0"', json.dumps(talk)))
    report.main(report.Args(run=str(tmp_path)))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| logic | system: Be brief.\\nuser: a\\|b? |" in text
    assert "## One question: system: Be brief. user: a|b?\n" in text


def test_an_evaluation_of_earlier_weights_is_refused(tmp_path):
    """The stage was trained again after its evaluation."""
    fake_stage(tmp_path, "sft", [1.0])
    record = json.loads((tmp_path / "sft" / "run.json").read_text())
    (tmp_path / "sft" / "run.json").write_text(json.dumps(record | {"seconds": 61.0}))
    refuses(lambda: report.main(report.Args(run=str(tmp_path))), "trained again", "sft")
