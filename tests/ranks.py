"""A small torchrun for test_distributed.py:

    python tests/ranks.py n job.json

loads torch once, forks into n processes and prints their exit codes. The job is either
{"command": [script, words of it]} or {"runs": [{"stage", "args", "stop", "nan"}, ...]}: each of
these ends as if killed when the state of step "stop" is saved (0: never); in the steps of "nan" the
MLP of layer 1 fails, in the last process only."""
import importlib
import json
import math
import os
import runpy
import socket
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Stopped(Exception):
    pass


def run(stage: str, args: dict, stop: int = 0, nan=()) -> None:
    """One stage. Samples are drawn a query at a time from a generator of its own, so that they do
    not depend on the process. Blocks are recomputed if and only if the arguments ask for it."""
    import lib.run
    import model
    from lib import dist
    from lib.args import handle_stop_signals
    import sample
    from tasks import queries
    stage = importlib.import_module(stage)
    generate, builtin = sample.generate, queries.builtin
    begin, log, save_state = lib.run.Run.start_or_resume, lib.run.Run.log, lib.run.Run.save_state
    last, clock, recomputed = dist.RANK == dist.WORLD - 1, [1], []
    recompute = model.recompute_in_backward

    def count_recomputed(*args, **kwargs):
        recomputed.append(1)
        return recompute(*args, **kwargs)

    def alone(model, prompts, *args, seed=0, **kwargs):
        seeds = [seed % 1_000_000_007 + zlib.crc32(str(prompt).encode()) for prompt in prompts]
        return [answer for prompt, seed in zip(prompts, seeds, strict=True)
                for answer in generate(model, [prompt], *args, seed=seed, **kwargs)]

    def begin_and_poison(run, model, optimizer):
        start = begin(run, model, optimizer)
        clock[0] = start + 1
        model.model.layers[1].mlp.register_forward_hook(
            lambda module, inputs, y: y * math.nan if last and clock[0] in nan
            and y.requires_grad else None)
        return start

    def log_and_count(*args, **kwargs):
        log(*args, **kwargs)
        clock[0] += 1

    def save_and_stop(run, step, *args):
        save_state(run, step, *args)
        if step == stop:
            raise Stopped
    new = [(sample, "generate", alone), (lib.run.Run, "start_or_resume", begin_and_poison),
           (model, "recompute_in_backward", count_recomputed),
           (lib.run.Run, "log", log_and_count), (lib.run.Run, "save_state", save_and_stop),
           (queries, "builtin", lambda split, n, seed=0: builtin(split, min(n, 3), seed))]
    old = [(where, name, getattr(where, name)) for where, name, _ in new]
    try:
        for change in new:
            setattr(*change)
        stage.main(stage.Args(**args))
    except Stopped:
        pass
    finally:
        for change in old:
            setattr(*change)
        handle_stop_signals()  # or the handler keeps the run, and with it its lock
    assert bool(recomputed) == args.get("gradient_checkpointing", False)


def child(job: dict) -> None:
    if "command" in job:
        sys.argv = job["command"]
        return runpy.run_path(sys.argv[0], run_name="__main__")
    from lib import dist
    dist.init_distributed()
    for one in job["runs"]:
        run(**one)


def main(n: int, job: dict) -> None:
    import torch.distributed.fsdp  # noqa: F401
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return child(job)
        children.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
