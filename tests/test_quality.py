"""quality.py: the classifier against logistic regression's
known limits, AUC by counting pairs, what is kept, and generated data that passed its check."""
import importlib.util
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import stage_args, teach_letters, write_rows

import data.documents
from data import quality
from data.judge import RUBRICS
import reward
from lib.args import InputError
from lib.files import read_jsonl
from reward import RewardModel
from sample import load_policy


def pages(n, seed=0):
    """Labelled texts: good ones hold "theorem" or "proof", bad ones "buy" or "click"."""
    r = random.Random(seed)
    for i in range(n):
        words = [f"w{r.randrange(200)}" for _ in range(30)]
        for place in r.sample(range(30), 6):
            words[place] = r.choice((("buy", "click"), ("theorem", "proof"))[i % 2])
        yield {"text": " ".join(words), "label": i % 2, "domain": ("shop", "maths")[i % 2]}


@pytest.fixture
def args(tmp_path):
    labels = write_rows(tmp_path / "labels.jsonl", list(pages(200)))
    return stage_args(quality, labels=labels, out=str(tmp_path / "out"))


def test_auc_counts_pairs():
    assert quality.auc([3, 1, 2, 0], [1, 0, 1, 0]) == 1.0
    assert quality.auc([0, 1, 2, 3], [1, 0, 1, 0]) == 0.25  # of four pairs, only 2 over 1
    assert quality.auc([5, 5, 5], [1, 0, 1]) == 0.5
    r = random.Random(0)
    scores, good = ([r.randrange(n) for _ in range(60)] for n in (9, 2))
    pairs = [(a > b) + (a == b) / 2 for a, x in zip(scores, good, strict=True) if x
             for b, y in zip(scores, good, strict=True) if not y]
    assert quality.auc(scores, good) == pytest.approx(sum(pairs) / len(pairs))
    many = list(range(400_000))  # pair by pair, these would be 40,000,000,000 numbers
    assert quality.auc(many, [i % 2 for i in many]) == pytest.approx(0.5, abs=1e-5)


def test_best_keeps_a_share_of_the_text_not_of_the_documents():
    assert quality.best([1, 9, 5, 7], [10, 50, 20, 20], 0.7).tolist() == [False, True, False, True]
    assert quality.best([1, 1, 1], [1, 1, 0], 1.0).all()
    # the best document alone is more than the share: it stays, and only it
    assert quality.best([1, 9, 5], [10, 80, 10], 0.5).tolist() == [False, True, False]


def test_classifier_learns_words_that_decide(args):
    texts, targets, classes = quality.read_labels(args.labels, "label")
    assert classes == ["low", "quality"] and targets.tolist()[:2] == [[1, 0], [0, 1]]
    bags = [quality.features(text) for text in texts]
    probs = quality.cross_validate(bags, targets, 5, seed=0)
    assert quality.agreement(probs, targets, classes)["auc"] > 0.9
    model = quality.train(bags, targets, seed=0)
    new = {word: quality.classify(model, classes, f"w3 w4 {word} w5")["quality"]
           for word in ("theorem", "buy", "w6")}
    assert new["theorem"] > new["w6"] > new["buy"]
    # a bag is a set, its sum divided by the root of its size
    bag = quality.features("theorem proof theorem proof")
    assert len(bag) == 4  # two words, two pairs
    want = model.bias + model.weight[bag].sum(0) / 2
    torch.testing.assert_close(model([bag, bag])[1], want)
    assert torch.equal(model([quality.features("")])[0], model.bias)


def test_scores_are_kept_and_the_worse_half_goes(args, tmp_path):
    documents = [{**row, "source": "web"} for row in pages(100, seed=5)]
    source = write_rows(tmp_path / "web.jsonl", documents)
    report = quality.main(replace(args, data=source, keep=0.5))
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "web.jsonl")]
    assert 45 <= len(rows) == report["sources"]["web"] <= 51
    good = [word in row["text"] for row in rows for word in ("theorem", "proof")]
    assert sum(good) > 0.9 * len(rows) and all(0 < row["scores"]["quality"] < 1 for row in rows)
    assert [row["text"] for row in rows] == [d["text"] for d in documents
                                             if d["text"] in {row["text"] for row in rows}]
    assert report["classifier"]["auc"] > 0.9
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    with pytest.raises(InputError, match="--overwrite"):
        quality.main(args)


def test_domains_become_sources(args, tmp_path):
    source = write_rows(tmp_path / "web.jsonl", list(pages(60, seed=5)))
    report = quality.main(replace(args, data=source, label="domain"))
    assert set(report["sources"]) == {"maths", "shop"} and report["classifier"]["agreement"] > 0.9
    shop = list(data.documents.read_documents(tmp_path / "out" / "shop.jsonl"))
    right = sum("buy" in doc["text"] or "click" in doc["text"] for doc in shop)
    assert right > 0.9 * len(shop) and all(doc["source"] == "shop" for doc in shop)


def test_a_domain_that_is_a_path_becomes_a_name(args, tmp_path):
    names = {"shop": "../x", "maths": "AI/ML"}
    rows = [row | {"domain": names[row["domain"]]} for row in pages(200)]
    labels = write_rows(tmp_path / "named.jsonl", rows)
    report = quality.main(replace(args, labels=labels, data=labels.replace("named", "labels"),
                                  label="domain"))
    assert set(report["sources"]) == {"___x", "AI_ML"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "AI_ML.jsonl", "___x.jsonl", "report.json"]


def test_a_lone_surrogate_is_written_and_read_again(args, tmp_path):
    source = write_rows(tmp_path / "web.jsonl", [{"text": "a \ud800 b"}])
    quality.main(replace(args, data=source))
    assert [doc["text"] for doc in data.documents.read_documents(tmp_path / "out" / "web.jsonl")
            ] == ["a \ud800 b"]


def test_judged_documents(args, micro_run, tmp_path):
    source = write_rows(tmp_path / "web.jsonl", list(pages(6)))
    labels = write_rows(tmp_path / "few.jsonl", list(pages(8)))
    report = quality.main(replace(args, labels=labels, judge=str(micro_run), data=source))
    assert set(report["judge"]) == {*RUBRICS["documents"], "mean"}
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "web.jsonl")]
    assert len(rows) == 6 and set(rows[0]["scores"]) == {*RUBRICS["documents"], "mean", "quality"}
    _, targets, _ = quality.read_labels(str(tmp_path / "out" / "web.jsonl"), "mean")
    means = [row["scores"]["mean"] for row in rows]  # what the classifier can learn from the judge
    assert targets[:, 1].argsort().tolist() == torch.tensor(means).argsort().tolist()


def test_generated_documents_passed_their_check(args, tokenizer, tmp_path, monkeypatch):
    """Answers of a policy that says "A." or "B.": only what the check asks for is written, once a
    question, and of two that pass the one with the higher reward."""
    policy = str(teach_letters(tokenizer, tmp_path / "policy"))
    queries = [{"prompt": q, "domain": "instruction", "check": {"kind": "rules"}}
               for q in ("Pick A.", "Choose A.")]
    right = {"Pick A.": {"A."}, "Choose A.": {"A.", "B."}}
    monkeypatch.setattr(quality.tasks.queries, "builtin", lambda split, n, seed: queries)
    monkeypatch.setattr(quality.tasks.queries, "score_many", lambda queries, answers, _: [
        float(a in right[q["prompt"]]) for q, a in zip(queries, answers, strict=True)])
    args = replace(args, labels="", generate=2, responses=16, policy=policy)
    report = quality.main(args)
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "generated_instruction.jsonl")]
    assert report["sources"] == {"generated_instruction": 3}
    assert {("Pick" in row["text"], row["text"].split()[-1]) for row in rows} == {
        (True, "A."), (False, "A."), (False, "B.")}
    scorer = RewardModel.from_language_model(load_policy(policy, "cpu")[0], tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    monkeypatch.setattr(reward.RewardModel, "score",
                        lambda self, prompts, answers: [float(a == "B.") for a in answers])
    quality.main(replace(args, reward_model=str(tmp_path / "scorer"), overwrite=True))
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "generated_instruction.jsonl")]
    assert [(row["text"].split()[-1], row["scores"]["reward"]) for row in rows] == [
        ("B.", 1.0), ("A.", 0.0)]
    assert all(row["kind"] == "synthetic" for row in rows)


@pytest.mark.parametrize("rows, match", [
    ([{"text": "a"}], r'x\.jsonl:1: must have a "text" and a number or a name under "label"'),
    ([{"text": "a", "label": 1}, {"text": "b", "label": "good"}], "numbers only or names only"),
    ([{"text": "a", "label": 1}], "more than one"), ([], "more than one")])
def test_bad_labels_are_named(rows, match, tmp_path):
    with pytest.raises(InputError, match=match):
        quality.read_labels(write_rows(tmp_path / "x.jsonl", rows), "label")


@pytest.mark.parametrize("values, match", [
    ({"labels": ""}, "--labels, --judge or --generate"),
    ({"labels": "", "judge": "x"}, "pass --data or --labels"),
    ({"generate": 2}, "without --data, --labels"),
    ({"generate": 2, "labels": "", "data": "x"}, "without --data, --labels"),
    ({"generate": 2, "labels": "", "keep": 0.5}, "needs --reward_model"),
    ({"label": "domain", "keep": 0.5}, "holds names"),
    ({"out": "labels.jsonl"}, "overlaps")])
def test_nothing_to_do_or_too_much_is_refused(args, values, match, tmp_path):
    if "out" in values:
        values = {"out": str(tmp_path)}
    with pytest.raises(InputError, match=match):
        quality.main(replace(args, **values))


def test_scores_that_are_null_are_none(tmp_path):
    rows = [{"text": "a", "label": 1, "scores": None}, {"text": "b", "scores": {"label": 2}}]
    _, targets, _ = quality.read_labels(write_rows(tmp_path / "x.jsonl", rows), "label")
    assert targets[:, 1].tolist() == [0, 1]


def test_published_labels_are_foretold(shared, tmp_path):
    """DCLM's human study, 5 folds: LOG.md, 2026-11-24, has 0.81; length alone 0.77."""
    path = str(shared / "text" / "dclm_quality_labels.jsonl")
    report = quality.main(stage_args(quality, labels=path, out=str(tmp_path)))
    assert report["classifier"]["auc"] > 0.78 and report["classifier"]["agreement"] > 0.68


def test_real_domains_are_told_apart(shared, tmp_path):
    """90 documents each of five collections, without their first thirds, 5 folds; chance is 20%.
    LOG.md, 2026-11-24, has the number."""
    found = {domain: [row[field] for _, row in read_jsonl(shared / f"{file}.jsonl")]
             for domain, file, field in (
                 ("web", "text/c4_demo", "text"), ("technical", "text/peps", "text"),
                 ("maths", "math/gsm8k_test", "question"), ("code", "code/mbpp_train", "code"))}
    wiki = (shared / "text" / "wikitext2_valid.txt").read_text("utf-8")
    articles = re.split(r"\n = (?!=)[^\n]+ (?<!=)= \n", wiki)
    articles += (shared / "text" / "wiki_demo.txt").read_text("utf-8").splitlines()
    found["encyclopedia"] = [text for text in articles if len(text) > 500]
    rows = [{"domain": domain, "text": text[len(text) // 3:][:1000]}
            for domain, texts in found.items() for text in texts[:90]]
    assert len(rows) == 450
    report = quality.main(stage_args(quality, labels=write_rows(tmp_path / "domains.jsonl", rows),
                                     label="domain", out=str(tmp_path / "out")))
    assert report["classifier"]["agreement"] > 0.87


@pytest.mark.slow
def test_the_recipe_that_measures_filtering_and_mixture(shared, tmp_path):
    """Every run once, at a few steps; a second call has nothing left to do."""
    spec = importlib.util.spec_from_file_location(
        "data_choices", Path(quality.__file__).parents[1] / "recipes" / "data_choices.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    args = stage_args(recipe, out=str(tmp_path), data=str(shared), filter_tokens=4000, seeds=2,
                      mixture_tokens=4000)
    recipe.main(args)
    rows = [row for _, row in read_jsonl(tmp_path / "rows.jsonl")]
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("all", "best half", *recipe.MIXTURES) for seed in (0, 1)]
    assert all(2 < bits < 5 for row in rows for bits in row["bits"].values())
    mixed = json.loads((tmp_path / "mixture-a_third_each-0" / "run.json").read_text())
    shares = [row["share"] for row in mixed["result"]["mixture"].values()]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    before = (tmp_path / "rows.jsonl").stat().st_mtime_ns
    recipe.main(args)
    assert (tmp_path / "rows.jsonl").stat().st_mtime_ns == before
    assert (tmp_path / "table.md").read_text().count("\n| ") == 5 + 1
