"""Real mathematics and code for the demo: the training files of GSM8K, MATH and MBPP.

    REAL=my/datasets make demo               # gsm8k_train.jsonl, ... somewhere below that directory

demo.sh calls `write`, which turns what it finds into documents for pre-training, conversations for
SFT and queries for RL, beside the built-in ones. One document in fifty is held out from all three.
`measure` prints the bits per byte of these for models of the run, before and after:

    python recipes/real_data.py write --real my/datasets --out runs/demo-real/real
    python recipes/real_data.py measure --models runs/demo-real/pretrain,runs/demo-real/grpo \\
        --out runs/demo-real/real            # writes bits_per_byte.md there

A model of a million parameters solves hardly one of these problems. It learns what they look like,
which the bits per byte show; for more, start the stages from published weights.
"""
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import tasks.queries  # noqa: E402
from data.documents import read_documents  # noqa: E402
from data.filters import normalise  # noqa: E402
from data.mixture import is_held_out  # noqa: E402
from lib.args import cli, require  # noqa: E402
from lib.files import read_jsonl, write_atomic, write_jsonl  # noqa: E402
from lib.optim import setup  # noqa: E402
from sample import load_policy  # noqa: E402
from tasks.benchmarks import final_answer, read_queries  # noqa: E402

FILES = {"gsm8k": "gsm8k_train.jsonl", "math": "math_train.jsonl", "mbpp": "mbpp_train.jsonl"}


@dataclass
class Args:
    real: str = ""                   # write: directory with the files, at any depth
    out: str = "runs/demo-real/real"  # where the files are written, and read again
    built_in: int = 600              # write: built-in demonstrations beside the real ones
    n_real: int = 600                # write: real conversations, and as many queries, at most
    models: str = ""                 # measure: model directories, comma-separated
    seed: int = 0                    # of the choice and the order
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


def worked_answer(row: dict) -> str:
    """Return the answer of a training file's row in the form of our demonstrations."""
    if "code" in row:  # MBPP
        code = row["code"].replace("\r\n", "\n").strip()
        return f"```python\n{code}\n```"
    if "solution" in row:  # MATH has a box already
        return row["solution"]
    steps = re.sub(r"<<.*?>>", "", row["answer"])  # the calculator's marks of GSM8K
    steps = steps.partition("####")[0].strip()
    return f"{steps}\nThe answer is \\boxed{{{final_answer(row['answer']).strip()}}}."


def read_examples(path: Path, source: str):
    """Yield (document, query, conversation) for each row of a file."""
    for (_, query), (_, row) in zip(read_queries(path), read_jsonl(path), strict=True):
        answer = worked_answer(row)
        text = normalise(f"{query['prompt']}\n\n{answer}")
        kind = "code" if query["check"]["kind"] == "code" else "prose"
        document = {"text": text, "source": source, "kind": kind}
        yield document, query, tasks.queries.conversation(query["prompt"], answer)


def write(args: Args) -> None:
    """Write documents.jsonl, sft.jsonl and rl.jsonl: --real, --out, --n_real, ..."""
    found = {}
    for source, name in FILES.items():
        paths = sorted(Path(args.real).rglob(name))
        if paths:
            found[source] = paths[0]
    require(args.real != "" and len(found) > 0,
            f"--real {args.real}: none of {', '.join(FILES.values())} in it")
    documents, learned = [], []
    for source, path in found.items():
        examples = list(read_examples(path, source))
        documents += [document for document, _, _ in examples]
        learned += [example for example in examples if not is_held_out(example[0]["text"])]
        print(f"{source}: {len(examples)} rows of {path}")
    r = random.Random(args.seed)
    r.shuffle(learned)
    learned = learned[:args.n_real]
    conversations = tasks.queries.demonstrations(args.built_in, args.seed)
    conversations += [conversation for _, _, conversation in learned]
    queries = tasks.queries.builtin("rl", args.n_real, args.seed)
    queries += [query for _, query, _ in learned]
    r.shuffle(conversations)
    r.shuffle(queries)
    out = Path(args.out)
    write_jsonl(out / "documents.jsonl", documents)
    write_jsonl(out / "sft.jsonl", conversations)
    write_jsonl(out / "rl.jsonl", queries)
    print(f"{len(documents)} documents, {len(conversations)} conversations and {len(queries)} "
          f"queries in {out}")


def measure(args: Args) -> None:
    """Print and write the bits per byte of the held-out documents: --models, --out"""
    texts = {}
    for document in read_documents(Path(args.out) / "documents.jsonl"):
        if is_held_out(document["text"]):
            texts.setdefault(document["source"], []).append(document["text"])
    device, autocast = setup(args)
    lines = ["| bits per byte | " + " | ".join(f"{name} ({len(some)} documents)"
                                               for name, some in texts.items()) + " |"]
    lines.append("|---" * (1 + len(texts)) + "|")
    for path in args.models.split(","):
        model, tokenizer = load_policy(path, device)
        with autocast:
            bits = [evaluate.bits_per_byte(model, tokenizer, some)["bits_per_byte"]
                    for some in texts.values()]
        lines.append(f"| {Path(path).name} | " + " | ".join(f"{b:.3f}" for b in bits) + " |")
    table = "\n".join(lines) + "\n"
    write_atomic(Path(args.out) / "bits_per_byte.md", table)
    print(table)


if __name__ == "__main__":
    cli(write, Args, write=write, measure=measure)
