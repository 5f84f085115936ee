"""Measures ours and a peer in turn, each (system, case) as a process of its own, pinned to a core.

A script calls `main` with its systems, {name: (function of a case, package it needs or None)}, and
its cases, {name: the systems to compare; the last one is what the ratios are to}. A function
returns `timed(...)`, one run of some work, with any of these added:
    work    how much was done, in `unit`; rates are work / seconds    (default 1)
    flops   floating-point operations done, and dtype "fp32" or "bf16": share of the GEMM ceiling
    extra   {column: number}, e.g. memory
    check   numbers that must agree with the first system's: losses, tokens

Rounds are interleaved, A B A B A B; a cell is the median of its processes (min-max), a ratio the
median of the rounds' ratios. CPU seconds are the measure: a neighbour on the core does not count
in them, though what it does to caches and clock does. The table goes to bench/RESULTS.md.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, SHARED = HERE.parent, HERE.parents[1] / "shared" / "data"
# bench/tokenizer.py must not stand in for the project's. Peers never get the project on their
# path: transformers probes for a package named kernels.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (HERE, ROOT)]


def ours():
    """Make the project's modules importable, in a worker that measures ours."""
    sys.path.insert(0, str(ROOT))


def medium(system):
    """A peer's function of a case, run with the one setting by which our kernels choose oneDNN."""
    def run(case):
        import torch
        torch.set_float32_matmul_precision("medium")
        return system(case)
    return run


def timed(fn, repeats=3, warmup=1):
    """Median CPU and wall seconds of fn(), and what its last call returned."""
    ticks = []
    for _ in range(warmup + repeats):
        start = time.process_time(), time.perf_counter()
        result = fn()
        ticks.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu, wall = map(statistics.median, zip(*ticks[warmup:], strict=True))
    return {"cpu": cpu, "wall": wall, "result": result}


def memory(peak=False, reset=False):
    """Resident MB of this process now, or its peak since a reset; nan where the OS is not Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024 / 1e6
    except OSError:
        return float("nan")


SMALL = dict(vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2)  # the shape of most scripts


def save_model(directory, shape=SMALL):
    """Seeded random weights as a model directory, none of them zero, as ours are at the start."""
    ours()
    import torch

    from model import Config, Qwen2
    torch.manual_seed(0)
    model = Qwen2(Config(**shape, rope_theta=1e4, max_position_embeddings=4096,
                         tie_word_embeddings=True))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2 and not p.any():
                p.normal_(0.0, p.shape[-1] ** -0.5)
    model.save_pretrained(directory)


def ceiling(_):
    """The best matrix product that torch reaches here, in GFLOP/s of CPU time."""
    import torch
    best = {}
    for name, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        for n in (1024, 1536, 2048):
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            t = timed(lambda a=a, b=b: torch.mm(a, b), repeats=5)
            best[name] = max(best.get(name, 0.0), 2 * n**3 / t["cpu"] / 1e9)
    return best


def agreement(a, b):
    """Text on two lists of numbers: the share of equal integers, or the largest relative gap."""
    if len(a) != len(b):
        return f"lengths {len(a)} and {len(b)}"
    if all(isinstance(x, int) for x in a):
        return f"{sum(x == y for x, y in zip(a, b, strict=True)) / len(a):.1%} of {len(a)} equal"
    worst = max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))
    return f"within {worst:.1e}"


def spread(values, digits=3):
    """Numbers -> "median (min-max)" in significant digits."""
    shown = [statistics.median(values), min(values), max(values)]
    shown = [f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}" for x in shown]
    return f"{shown[0]} ({shown[1]}–{shown[2]})" if len(values) > 1 else shown[0]


def round_ratios(rows, base):
    """The ratios of rates, of the rounds in which both ran. A result without a "round" is of the
    round of its place."""
    others = {b.get("round", i): b for i, b in enumerate(base)}
    found = []
    for i, a in enumerate(rows):
        b = others.get(a.get("round", i))
        if b:
            found.append(a.get("work", 1) / a["cpu"] * b["cpu"] / b.get("work", 1))
    return found


def table(unit, runs, top, targets=()):
    """runs {case: {system: [result of each round]}} -> lines of a Markdown table. targets: {case:
    the ratio that the first system wants}."""
    results = [r for systems in runs.values() for rows in systems.values() for r in rows]
    extras = list(dict.fromkeys(name for r in results for name in r.get("extra", ())))
    gemm = any("flops" in r for r in results)
    head = ["case", "system", f"{unit} per CPU s", "per wall s", "ratio"]
    head += ["target"] * bool(targets) + ["GFLOP/s", "of GEMM"] * gemm + extras + ["check"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case, systems in runs.items():
        first, base = (list(systems.values())[i] if systems else [] for i in (0, -1))
        for system, rows in systems.items():
            rate, wall = ([r.get("work", 1) / r[k] for r in rows] for k in ("cpu", "wall"))
            pairs = round_ratios(rows, base)
            cells = [case, system, spread(rate), spread(wall)]
            cells.append("1" if rows is base else spread(pairs, 2) if pairs else "none")
            if targets:
                aim = targets.get(case) if rows is first and rows is not base else None
                met = aim and pairs and statistics.median(pairs) >= aim
                cells.append(f"{aim} {'met' if met else 'missed'}" if aim else "")
            if gemm:
                speed = statistics.median(r["flops"] / r["cpu"] / 1e9 for r in rows)
                cells += [f"{speed:.0f}", f"{speed / top[rows[0]['dtype']]:.0%}"]
            cells += [spread([r["extra"][name] for r in rows]) for name in extras]
            both = rows is not first and "check" in rows[0] and "check" in first[0]
            cells.append(agreement(rows[0]["check"], first[0]["check"]) if both else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def machine():
    """The processor and the versions, in words."""
    info, path = "", Path("/proc/cpuinfo")
    if path.exists():
        wanted = [line.split(":")[1].strip() for line in path.read_text().splitlines()
                  if line.startswith(("model name", "cpu family", "model\t"))]
        info = platform.machine()  # ARM's has none of these lines
        if len(wanted) > 2:
            info = "{1}, family {0} model {2}".format(wanted[0], wanted[2], wanted[1])
    return f"{info}; python {platform.python_version()}, torch {metadata.version('torch')}"


def run(system, case, needs, directory, args):
    """One process: its result, or None and a line that says why."""
    command = [args.peers if needs else sys.executable, os.path.abspath(sys.argv[0])]
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RAYON_NUM_THREADS="1",
               HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    pin = getattr(os, "sched_setaffinity", None)  # Linux only
    done = subprocess.run([*command, "--worker", system, case, needs or ""], cwd=directory, env=env,
                          text=True, capture_output=True,
                          preexec_fn=pin and (lambda: pin(0, {args.core})))
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result = json.loads(line[7:])
            if "cpu" in result:
                print(f"  {case}, {system}: {result['cpu']:.3f} CPU s", flush=True)
            return result
    print(f"  {case}, {system}: left out, {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return None


def main(title, unit, systems, cases, prepare=None, targets=()):
    """The command line of every script. prepare(case) writes what the workers of a case share into
    the directory that they all start in. No cases: what they would read is not here."""
    parser = argparse.ArgumentParser(description=title)
    add = parser.add_argument
    add("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to pin to")
    add("--processes", type=int, default=3, help="processes a cell")
    add("--peers", default=sys.executable, type=os.path.abspath, help="python with the peers")
    add("--cases", default="", help="only cases that contain one of these words (comma-separated)")
    add("--systems", default="", help="only these systems (comma-separated, in full)")
    add("--out", default=str(HERE / "RESULTS.md"), help="file to append the table to")
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        system, case, needs = args.worker
        version = f"{needs} {metadata.version(needs)}" if needs else ""  # absent: says so and ends
        fn = {"prepare": prepare, "ceiling": ceiling}.get(system) or systems[system][0]
        result = {"version": version} | (fn(case) or {})
        result.pop("result", None)
        print("RESULT " + json.dumps(result))
        return
    if not cases:
        print(f"{title}: left out, {SHARED} is not here")
        return
    began, tops, runs, only = time.time(), [], {}, args.systems.split(",")
    cases = {c: cases[c] for c in cases if any(word in c for word in args.cases.split(","))}
    if not cases or not {*only} <= {"", *systems} or args.processes < 1:
        parser.error(f"nothing to run: --cases {args.cases} --systems {args.systems} "
                     f"--processes {args.processes}")
    print(title)
    for case in cases:
        rows = {system: [] for system in cases[case] if only == [""] or system in only}
        with tempfile.TemporaryDirectory() as directory:
            tops.append(run("ceiling", case, None, directory, args))
            if prepare:
                run("prepare", case, None, directory, args)
            for turn in range(args.processes):
                for system in [name for name in rows if turn == 0 or rows[name]]:
                    result = run(system, case, systems[system][1], directory, args)
                    rows[system] += [result | {"round": turn}] if result else []
        runs[case] = {system: found for system, found in rows.items() if found}
    top = {kind: statistics.median(t[kind] for t in tops if t) for kind in ("fp32", "bf16")}
    peers = {r["version"] for found in runs.values() for rs in found.values() for r in rs} - {""}
    command = [f"python bench/{Path(sys.argv[0]).name} --processes {args.processes}"]
    command += [f"--{k} '{v}'" for k in ("cases", "systems") if (v := getattr(args, k))]
    lines = [f"## {title}", "", f"`{' '.join(command)}`, {time.strftime('%Y-%m-%d %H:%M')}, "
             f"{time.time() - began:.0f} s. "
             f"{', '.join([machine(), *sorted(peers)])}. GEMM {top['fp32']:.0f} (fp32) and "
             f"{top['bf16']:.0f} (bf16) GFLOP/s. Ratios are to the last system of a case.", "",
             *table(unit, runs, top, targets), ""]
    print("\n".join(lines))
    with open(args.out, "a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines))
