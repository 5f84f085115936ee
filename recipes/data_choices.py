"""What filtering and the mixture are worth, measured by pre-training on little data.

Filtering: web pages (C4, Common Crawl, DCLM's human study) that pass the rules of data/filters.py.
We compare all of them with the half of the text that data/quality.py's classifier scores highest.
The classifier learned from DCLM's labels, and no labelled page is scored by a model that saw it.
Both runs have equal tokens (about one epoch or less) and one tokenizer. The measure is bits per
byte on clean text of other origin.

Mixture: general text, mathematics and code in three mixtures, measured in bits per byte on held-out
documents of each.

    python recipes/data_choices.py --data ../shared/data           # 2 minutes on one core

Rows are written as they come, and a finished run is not repeated. --out gets table.md.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import corpus  # noqa: E402
from data import dedup  # noqa: E402
import data.documents  # noqa: E402
from data import filters  # noqa: E402
from data import mixture  # noqa: E402
import evaluate  # noqa: E402
import pretrain  # noqa: E402
from data import quality  # noqa: E402
from lib.args import cli  # noqa: E402
from lib.files import read_jsonl, write_atomic  # noqa: E402
from lib.optim import setup  # noqa: E402
from sample import load_policy  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

MIXTURES = {"by size": "", "a third each": "general=1,maths=1,code=1",
            "maths and code 40% each": "general=0.2,maths=0.4,code=0.4"}


@dataclass
class Args:
    out: str = "runs/data_choices"   # where everything goes
    model: str = "micro"             # preset to train
    data: str = "../shared/data"     # directory with text/, math/ and code/
    filter_tokens: int = 300_000     # a run of the first experiment
    mixture_tokens: int = 200_000    # a run of the second
    seeds: int = 3                   # runs of each kind
    seed: int = 0                    # of the first run
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


def web_pages(folder: Path) -> tuple[list[dict], list[float]]:
    """Pages that pass the rules of data/, and the classifier's score of each."""
    labelled = folder / "dclm_quality_labels.jsonl"
    texts, targets, _ = quality.read_labels(str(labelled), "label")
    bags = [quality.features(text) for text in texts]
    probs = quality.cross_validate(bags, targets, folds=5, seed=0)
    known = {
        filters.normalise(text): p for text, p in zip(texts, probs[:, 1].tolist(), strict=True)
    }
    model = quality.train(bags, targets, seed=0)
    stages = filters.FILTERS | {"duplicate": dedup.NearDuplicates()}
    files = [folder / "c4_demo.jsonl", folder / "cc_en_head.jsonl", labelled]
    documents = (doc for file in files for doc in data.documents.read_documents(file))
    verdicts = filters.run_filters(documents, stages)
    pages = [verdict.document for verdict in verdicts if verdict.stage == "kept"]
    scores = [known.get(doc["text"], quality.classify(
        model, ["low", quality.QUALITY], doc["text"])[quality.QUALITY]) for doc in pages]
    return pages, scores


def write_filtered(folder: Path, out: Path) -> dict[str, list[str]]:
    """Both training sets -> clean texts to measure on: Wikipedia and a novel."""
    pages, scores = web_pages(folder)
    kept = quality.best(scores, [len(doc["text"]) for doc in pages], 0.5)
    best = [doc for doc, good in zip(pages, kept, strict=True) if good]
    for name, docs in (("all", pages), ("best half", best)):
        data.documents.write_sources(out / name, (doc | {"source": "web"} for doc in docs))
        print(f"{name}: {len(docs)} pages, {sum(len(d['text']) for d in docs) / 1e6:.2f} MB")
    wiki = (folder / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    novel = (folder / "sherlock.txt").read_text(encoding="utf-8")
    return {"Wikipedia": [article[:4000] for article in wiki], "novel": [novel[50_000:170_000]]}


def write_mixed(folder: Path, out: Path) -> dict[str, list[str]]:
    """Three sources -> the held-out documents of each."""
    wiki = (folder / "text" / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    general = [part for article in wiki for part in article.split(" . \n")]
    general += [
        doc["text"] for doc in data.documents.read_documents(folder / "text" / "c4_demo.jsonl")
    ]
    maths = [f"Question: {row['question']}\nAnswer: {row['answer']}"
             for _, row in read_jsonl(folder / "math" / "gsm8k_train.jsonl")]
    code = [doc["text"] for doc in corpus.builtin_corpus(0, 2.0)["stdlib_code"]]
    code = [part for text in code for part in text.split("\n\n\n") if len(part) > 100]
    sources = {"general": general, "maths": maths, "code": code}
    data.documents.write_sources(out / "mixed", ({"text": text, "source": name}
                                       for name, texts in sources.items() for text in texts))
    return {name: [t for t in texts if mixture.is_held_out(t)] for name, texts in sources.items()}


def main(args: Args) -> None:
    out, folder = Path(args.out), Path(args.data)
    device, autocast = setup(args)
    clean = write_filtered(folder / "text", out)
    held_out = write_mixed(folder, out)
    for name in ("all", "mixed"):
        if not (out / name / "tokenizer.json").exists():
            texts = (doc["text"] for doc in data.documents.read_all(str(out / name)))
            Tokenizer.train((t for t in texts if not mixture.is_held_out(t)), 2048).save_pretrained(
                out / name)
    runs = [("filter", name, name, "", "all", args.filter_tokens, clean)
            for name in ("all", "best half")]
    runs += [("mixture", name, "mixed", weights, "mixed", args.mixture_tokens, held_out)
             for name, weights in MIXTURES.items()]
    # What decides the numbers of a row. Rows of other arguments stay in the file, uncounted.
    same = {key: getattr(args, key) for key in ("model", "data", "filter_tokens", "mixture_tokens")}
    found = [row for _, row in read_jsonl(out / "rows.jsonl")] if (
        out / "rows.jsonl").exists() else []
    rows = [row for row in found if row.get("args") == same]
    others = [row for row in found if row.get("args") != same]
    for kind, name, folder, weights, tokenizer, tokens, texts in runs:
        for seed in range(args.seed, args.seed + args.seeds):
            if any((row["name"], row["seed"]) == (name, seed) for row in rows):
                continue
            run = str(out / f"{kind}-{name}-{seed}".replace(" ", "_"))
            result = pretrain.main(pretrain.Args(
                out=run, data=str(out / folder), weights=weights, tokenizer=str(out / tokenizer),
                model=args.model, tokens=tokens, lr=3e-3, seed=seed, eval_every=10**6,
                device=args.device, dtype=args.dtype, overwrite=True))
            model, tok = load_policy(run, device)
            with autocast, torch.no_grad():
                bits = {key: evaluate.bits_per_byte(model, tok, value)["bits_per_byte"]
                        for key, value in texts.items()}
            rows.append({"kind": kind, "name": name, "seed": seed, "bits": bits,
                         "loss": result["loss"], "args": same})
            print(rows[-1], flush=True)
            write_atomic(out / "rows.jsonl", "".join(
                json.dumps(row) + "\n" for row in others + rows))
    lines = []
    for kind, texts in (("filter", clean), ("mixture", held_out)):
        lines += ["| " + " | ".join([kind, *texts]) + " |", "|---" * (1 + len(texts)) + "|"]
        for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
            bits = [row["bits"] for row in rows if row["name"] == name]
            cells = [[b[key] for b in bits] for key in texts]
            lines.append(f"| {name} | " + " | ".join(
                f"{mean(c):.3f} ± {stdev(c) if len(c) > 1 else 0:.3f}" for c in cells) + " |")
        lines.append("")
    write_atomic(out / "table.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    cli(main, Args)
