"""Stages in one of several processes, for test_distributed.py: `python ranks.py job.json` with what
torchrun sets in the environment. The job is {"runs": [[stage, args], ...], "stop": step or 0}: with
`stop`, each run ends after the state of that step. Samples are drawn a query at a time from a
generator of the query's own, so that they do not depend on which process draws them."""
import importlib
import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distributed  # noqa: E402
import sample  # noqa: E402
import tasks  # noqa: E402
from common import Run  # noqa: E402

generate, builtin = sample.generate, tasks.builtin


def alone(model, prompts, *args, seed=0, **kwargs):
    return [c for prompt in prompts for c in generate(
        model, [prompt], *args, seed=seed % 1_000_000_007 + zlib.crc32(bytes(str(prompt), "utf-8")),
        **kwargs)]


def arm() -> None:
    sample.generate = alone
    tasks.builtin = lambda split, n, seed=0: builtin(split, min(n, 3), seed)


class Stopped(Exception):
    pass


def main(job: dict) -> None:
    distributed.join()
    arm()
    real = Run.save_state

    def save_state(run, step, model, optimizer):
        real(run, step, model, optimizer)
        if step == job["stop"]:
            raise Stopped
    Run.save_state = save_state
    for name, args in job["runs"]:
        stage = importlib.import_module(name)
        try:
            stage.main(stage.Args(**args))
        except Stopped:
            continue


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
