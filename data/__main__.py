"""Build a pre-training corpus: clean, de-duplicated, decontaminated documents, and their tokens.

The report improves its data in four ways (section 3.1): it filters by scores of Qwen2-Instruct
models, adds mathematics and code, adds synthetic data, and mixes in fewer templated web pages. Its
prompts, thresholds and ratios are not disclosed. This program runs the public part of the craft:
rules (filters.py), near-duplicates (dedup.py), and the report's own decontamination (section 5,
contamination.py). data/quality.py scores by models. Personal data and licences are not covered.

    python -m data                              # on text found on any machine, under a minute
    python -m data --input web.jsonl.gz,books.txt --out runs/mine
    python -m data --input web/ --tokenizer runs/demo/tokenizer --out runs/web    # and tokens

--out gets one {source}.jsonl per source, report.json, and with --tokenizer the token files that
pretrain.py maps. Memory stays flat; a temporary file takes 1.5 KB per document (dedup.py).
"""
import json
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import tasks.queries
from data.contamination import Contamination
from data.corpus import builtin_corpus, synthetic
from data.dedup import NearDuplicates
from data.documents import new_directory, read_all, read_documents, write_sources
from data.filters import FILTERS, run_filters
from data.mixture import is_held_out, write_tokens
from lib.args import cli, require
from lib.files import write_atomic
from tasks.benchmarks import contents
from tokenizer import Tokenizer


@dataclass
class Args:
    out: str = "runs/data"         # directory for {source}.jsonl and report.json
    input: str = ""                # files or directories, comma-separated; empty: built-in corpus
    evals: str = "test"            # test sets to keep out: names or files, comma-separated
    tokenizer: str = ""            # directory: write token files too, for pretrain.py to map
    max_mb: float = 6.0            # of standard library files in the built-in corpus
    synthetic_mb: float = 2.0      # of generated documents in the built-in corpus
    threshold: float = 0.75        # estimated Jaccard similarity that makes a near-duplicate
    show_dropped: int = 1          # dropped samples to print per reason, at most 20
    seed: int = 0                  # of the corpus sample and the generators
    overwrite: bool = False        # replace what --out holds


def load(args: Args):
    """Yield the documents of --input, or those of the built-in corpus."""
    if args.input:
        yield from read_all(args.input)
        return
    for documents in builtin_corpus(args.seed, args.max_mb).values():
        yield from documents
    n_bytes = int(args.synthetic_mb * 1e6 / len(tasks.queries.DOMAINS))
    for domain in tasks.queries.DOMAINS:
        for text in synthetic(domain, n_bytes, args.seed):
            yield {"text": text, "source": domain, "kind": "synthetic"}


def load_tests(names: str) -> list[str]:
    """Return the test items that no document may hold, without our prompt's words around them."""
    items = []
    for name in filter(None, names.split(",")):
        for query in tasks.queries.load(name, built_in=480):  # as many as evaluate.py asks
            item = query.get("item", query["prompt"])  # a text or messages
            items.append("\n".join(contents(item)))
    return items


def tally(verdicts, sources: dict, dropped: Counter, samples: dict):
    """Yield the documents that are kept. Count all documents per source, the dropped ones per
    stage, and keep samples: what report.json says."""
    for document, stage, reason in verdicts:
        text = document["text"]
        mb = len(text.encode("utf-8", "replace")) / 1e6
        row = sources.setdefault(
            document["source"], {"documents": 0, "mb": 0, "kept": 0, "kept_mb": 0})
        row["documents"] += 1
        row["mb"] += mb
        if len(samples[stage]) < 20 or stage == "contaminated":  # these are listed in full
            samples[stage].append({"text": text[:200], "reason": reason})
        if reason:
            dropped[stage] += 1
        else:
            row["kept"] += 1
            row["kept_mb"] += mb
            yield document


def print_tally(sources: dict, dropped: Counter, samples: dict, n_samples: int) -> None:
    documents = 0
    print("source               documents      MB    kept      MB")
    for name, row in sorted(sources.items()):
        documents += row["documents"]
        print("{:<20}{documents:>10}{mb:>8.2f}{kept:>8}{kept_mb:>8.2f}".format(name, **row))
    print(f"\ndropped {dropped.total()} of {documents} documents, for example:")
    for stage, count in dropped.items():
        print(f"{count:>8} {stage}")
        for sample in samples[stage][:n_samples]:
            start = " ".join(sample["text"].split())
            print(f"         {sample['reason']}: {start!r}"[:120])


def write_token_files(out: Path, source: str, tokenizer: Tokenizer) -> None:
    """Tokenize {source}.jsonl: training and held-out documents apart."""
    for part in ("train", "held_out"):
        texts = (document["text"] for document in read_documents(out / f"{source}.jsonl"))
        chosen = (text for text in texts if is_held_out(text) == (part == "held_out"))
        write_tokens(out / f"{source}.{part}", chosen, tokenizer)


def main(args: Args) -> dict:
    started = time.time()
    out = new_directory(args.out, args.overwrite, args.input, args.evals)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    # Duplicates come last: else a document could be one of another that is dropped as contaminated.
    stages = FILTERS | {"contaminated": Contamination(load_tests(args.evals)),
                        "duplicate": NearDuplicates(args.threshold, seed=args.seed)}
    sources = {}
    dropped = Counter()
    samples = defaultdict(list)
    kept = write_sources(out, tally(run_filters(load(args), stages), sources, dropped, samples))
    require(len(kept) > 0, f"no document is left; dropped were {dict(dropped)}")
    if tokenizer:
        for source in kept:
            write_token_files(out, source, tokenizer)
        tokenizer.save_pretrained(out)
    print_tally(sources, dropped, samples, args.show_dropped)
    seconds = round(time.time() - started, 1)
    result = {"args": asdict(args), "seconds": seconds, "sources": sources, "dropped": dropped,
              "samples": samples}
    write_atomic(out / "report.json", json.dumps(result, indent=1) + "\n")
    print(f"data: {out} ready after {seconds:.0f} s")
    return result


if __name__ == "__main__":
    cli(main, Args)
