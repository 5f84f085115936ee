"""Measure the three records of RECORDS.md and append them: make record

What a stage reaches in a fixed time on two cores, with data that anyone can get. RECORDS.md has the
rules. A step takes another time on every machine, so a short probe measures it first, and the run
gets as many steps as fit into its budget.

    python bench/records.py --shakespeare input.txt --demo runs/demo
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "RECORDS.md"
SPARE = 0.95  # the share of a budget that is planned; a busy moment may take the rest


@dataclass
class Run:
    command: str      # as in RECORDS.md
    seconds: float    # of the whole process
    cpu_seconds: float


def run(command: list, threads: int, show: bool = False) -> Run:
    """Run a program of the project. Its CPU seconds are known when it has ended."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                               stdout=None if show else subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {status}")
    seconds = time.perf_counter() - began
    return Run("python " + " ".join(map(str, command)), seconds,
               usage.ru_utime + usage.ru_stime)


def run_for(command: list, flag: str, probe: int, budget: float, threads: int) -> Run:
    """Run the command with as much of `flag` as fits into `budget` seconds.

    Two probes, of `probe` and three times as much, tell what starting and what a unit takes."""
    with tempfile.TemporaryDirectory() as scratch:
        probe_command = [*command, "--out", Path(scratch) / "run", "--overwrite", flag]
        short = run([*probe_command, probe], threads).seconds
        long = run([*probe_command, 3 * probe], threads).seconds
    if long <= 1.2 * short:
        raise SystemExit(f"{command[0]}: probes of {probe} and {3 * probe} {flag} took {short:.1f} "
                         f"and {long:.1f} s, too close to tell the speed; try again")
    unit = (long - short) / (2 * probe)
    start = max(0.0, short - unit * probe)
    amount = max(probe, int((budget * SPARE - start) / unit))
    return run([*command, flag, amount, "--out", out_of(command), "--overwrite"], threads)


def out_of(command: list) -> Path:
    return ROOT / "runs" / f"record-{Path(command[0]).stem}"


# ---------------------------------------------------------------------------------------------
# the three records

def shakespeare(text_file: str, budget: float) -> tuple[str, str, Run]:
    """Bits per character of the last tenth of tinyshakespeare, nanoGPT's validation part, after
    `budget` seconds."""
    text = Path(text_file).read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    train = ROOT / "runs" / "record-shakespeare.jsonl"
    train.parent.mkdir(exist_ok=True)
    with open(train, "w", encoding="utf-8") as file:
        for document in speeches(text[:cut]):
            file.write(json.dumps({"text": document}) + "\n")
    command = ["pretrain.py", "--data", train, "--vocab_size", 1024, "--seq_len", 128,
               "--lr", 1.5e-3]
    done = run_for(command, "--tokens", 60_000, budget, threads=2)
    bits = bits_per_byte(out_of(command), speeches(text[cut:]), window=128)
    return "tinyshakespeare, bits per character", f"{bits:.3f}", done


def speeches(text: str, size: int = 2000) -> list[str]:
    """Group whole speeches into documents of about `size` characters. Joined, they are the text."""
    documents = [""]
    for speech in re.split(r"(?<=\n\n)", text):
        if len(documents[-1]) > size:
            documents.append("")
        documents[-1] += speech
    return documents


def pretraining(demo: Path) -> tuple[str, str, Run]:
    """Bits per byte of the built-in text that pre-training has held out."""
    command = ["pretrain.py", "--data", demo / "data", "--tokenizer", demo / "tokenizer"]
    done = run_for(command, "--tokens", 40_000, BUDGET_SECONDS, threads=1)
    sys.path.insert(0, str(ROOT))
    from evaluate import held_out_texts
    bits = bits_per_byte(out_of(command), held_out_texts(str(demo / "data")), window=512)
    return "built-in text, bits per byte", f"{bits:.3f}", done


def reinforcement(demo: Path) -> tuple[str, str, Run]:
    """pass@1 on the test queries after GRPO from the demo's SFT model, judged by the checks."""
    command = ["grpo.py", "--init", demo / "sft", "--n_queries", 1200, "--query_order", "random",
               "--batch_queries", 24, "--lr", 3e-4]
    done = run_for(command, "--steps", 3, BUDGET_SECONDS, threads=1)
    evaluation = ROOT / "runs" / "record-evaluation"
    run(["evaluate.py", "--init", out_of(command), "--out", evaluation], threads=1)
    record = json.loads((evaluation / "eval.json").read_text())
    total = record["metrics"]["pass@1"]["total"]
    return "GRPO from the demo's SFT model, pass@1", f"{100 * total['mean']:.1f}", done


def bits_per_byte(directory: Path, texts: list[str], window: int) -> float:
    sys.path.insert(0, str(ROOT))
    import evaluate
    from sample import load_policy
    model, tokenizer = load_policy(directory, "cpu")
    return evaluate.bits_per_byte(model, tokenizer, texts, window)["bits_per_byte"]


SHAKESPEARE_SECONDS = 60.0   # two threads
BUDGET_SECONDS = 180.0       # one thread each; the two runs share the machine


# ---------------------------------------------------------------------------------------------

def append(name: str, result: str, done: Run, budget: float) -> None:
    """Append a row to the table at the end of RECORDS.md, unless the run took too long."""
    if done.seconds > budget:
        print(f"{name}: {result}, but in {done.seconds:.0f} s instead of {budget:.0f}: no record")
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    shown = done.command.replace(f"{ROOT}/", "")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    row = (f"| {name} | **{result}** | {done.seconds:.0f} | {done.cpu_seconds:.0f} | "
           f"{date.today()} | {commit} | {machine} | `{shown}` |")
    print(row)
    with open(RECORDS, "a", encoding="utf-8") as file:
        file.write(row + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shakespeare", default="", help="tinyshakespeare, one text file")
    parser.add_argument("--demo", default="runs/demo", help="a finished `make demo`")
    parser.add_argument("--only", default="", help="pretraining or reinforcement, in this process")
    args = parser.parse_args()
    demo = Path(args.demo)
    if not (ROOT / demo / "sft" / "run.json").exists():
        raise SystemExit(f"--demo {demo}: no finished SFT model in it; run `make demo` first")
    if args.only == "pretraining":
        append(*pretraining(demo), BUDGET_SECONDS)
    elif args.only == "reinforcement":
        append(*reinforcement(demo), BUDGET_SECONDS)
    else:
        each = [sys.executable, __file__, "--demo", args.demo, "--only"]
        both = [subprocess.Popen([*each, name]) for name in ("pretraining", "reinforcement")]
        failed = [process.wait() for process in both]
        if args.shakespeare:
            append(*shakespeare(args.shakespeare, SHAKESPEARE_SECONDS), SHAKESPEARE_SECONDS)
        if any(failed):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
