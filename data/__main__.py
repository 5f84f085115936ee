"""Pre-training data: documents in; clean, de-duplicated, decontaminated, mixed tokens out.

Report section 3.1 improves the data in four ways: filtering (Qwen2-Instruct models score every
document), more mathematics and code, synthetic data, a mixture with fewer templated web pages.
Prompts, thresholds and ratios are not disclosed. Here stands the public part of the craft:
heuristic filters with a reason for every dropped document, MinHash near-duplicate removal, token
shares, and the report's own decontamination rule (section 5).

    python -m data                              # on text found on any machine, under a minute
    python -m data --input web.jsonl.gz,books.parquet --languages en,zh --out runs/mine
    python -m data --input web/ --tokenizer runs/demo/tokenizer --out runs/web    # and tokens

A document is {"text", "source"?, "kind"?}; kind is prose, code or synthetic. The run writes
{source}.jsonl per source, with --tokenizer memory-mapped token files for pretrain.py, and
report.json. It reads document by document: memory does not grow with the input (LOG.md,
"pre-training data"). Scores by models: data/quality.py. Not covered: personal data, licences.
"""
import json
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial

from data.contamination import Contamination
from data.corpus import builtin_corpus, synthetic
from data.dedup import NearDuplicates
from data.documents import new_directory, read_all, read_documents, write_sources
from data.filters import FILTERS, other_language, run_filters
from data.mixture import is_held_out, write_tokens
from lib.args import cli, require
from lib.files import write_atomic

# ---------------------------------------------------------------------------------------------

@dataclass
class Args:
    out: str = "runs/data"         # directory for {source}.jsonl and report.json
    input: str = ""                # files or directories, comma-separated; empty: built-in corpus
    evals: str = "test"  # tests to keep out: names or files for tasks.load, with commas
    languages: str = ""  # of prose to keep, as en,zh,unknown (see tasks/ifeval.py); empty: all
    tokenizer: str = ""            # directory: write token files too, for pretrain.py to map
    max_mb: float = 6.0            # of standard library files in the built-in corpus
    synthetic_mb: float = 2.0      # of generated documents in the built-in corpus
    threshold: float = 0.75        # estimated Jaccard similarity that makes a near-duplicate
    show_dropped: int = 1          # dropped samples to print per reason, at most 20
    seed: int = 0                  # of the corpus sample and the generators
    overwrite: bool = False        # replace what --out holds


def load(args: Args):
    """The documents, one after another."""
    if args.input:
        yield from read_all(args.input)
        return
    import tasks.queries
    for docs in builtin_corpus(args.seed, args.max_mb).values():
        yield from docs
    for domain in tasks.queries.DOMAINS:
        for text in synthetic(
            domain, int(args.synthetic_mb * 1e6 / len(tasks.queries.DOMAINS)), args.seed
        ):
            yield {"text": text, "source": domain, "kind": "synthetic"}


def load_tests(names: str) -> list[str]:
    """The test items that documents must not hold, without what our prompts say around them."""
    import tasks.queries
    items = [query.get("item", query["prompt"])
             for name in names.split(",") if name for query in tasks.queries.load(name)]
    return [item if isinstance(item, str) else "\n".join(message["content"] for message in item)
            for item in items]


def main(args: Args) -> dict:
    started, out = time.time(), new_directory(args.out, args.overwrite)
    tok = None
    if args.tokenizer:
        from tokenizer import Tokenizer
        tok = Tokenizer.from_pretrained(args.tokenizer)
    wanted = tuple(filter(None, args.languages.split(",")))
    stages = FILTERS | {"language": partial(other_language, wanted=wanted),
                        "duplicate": NearDuplicates(args.threshold, seed=args.seed),
                        "contaminated": Contamination(load_tests(args.evals))}
    sources, dropped, samples = {}, Counter(), defaultdict(list)

    def kept():
        for doc, name, reason in run_filters(load(args), stages):
            row = sources.setdefault(doc["source"], dict.fromkeys(
                ("documents", "mb", "kept", "kept_mb"), 0))
            mb = len(doc["text"].encode("utf-8", "replace")) / 1e6
            row["documents"], row["mb"] = row["documents"] + 1, row["mb"] + mb
            if len(samples[name]) < 20 or name == "contaminated":  # these are listed in full
                samples[name].append({"text": doc["text"][:200], "reason": reason})
            if reason:
                dropped[name] += 1
            else:
                row["kept"], row["kept_mb"] = row["kept"] + 1, row["kept_mb"] + mb
                yield doc
    write_sources(out, kept())
    count = sum(row["documents"] for row in sources.values())
    require(sum(dropped.values()) < count, f"nothing is left of {count} documents: {dict(dropped)}")

    print(f"{'source':<20}{'documents':>10}{'MB':>8}{'kept':>8}{'MB':>8}")
    for name, row in sorted(sources.items()):
        print("{:<20}{:>10}{:>8.2f}{:>8}{:>8.2f}".format(name, *row.values()))
        for part in ("train", "held_out") if tok and row["kept"] else ():
            texts = (doc["text"] for doc in read_documents(out / f"{name}.jsonl"))
            write_tokens(out / f"{name}.{part}", (
                text for text in texts if is_held_out(text) == (part == "held_out")), tok)
    if tok:
        tok.save_pretrained(out)
    print(f"\ndropped {sum(dropped.values())} of {count} documents, for example:")
    for name, n in dropped.items():
        print(f"{n:>8} {name}")
        for sample in samples[name][:args.show_dropped]:
            print(f"{'':9}{sample['reason']}: {' '.join(sample['text'].split())!r}"[:120])
    result = {"args": asdict(args), "seconds": round(time.time() - started, 1), "sources": sources,
              "dropped": dict(dropped), "samples": samples}
    write_atomic(out / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"data: {out} ready after {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    cli(main, Args)
