"""A stage in child processes that are killed at a chosen moment, for test_faults.py:

    python tests/robustness/faults.py job.json

The job is {"stage", "args", "work", "kills"}. Every run is a fork of this process, which has loaded
torch but never used it. Moments are counted: each forward pass, optimizer step, log line, and each
file that is written, renamed or removed is one, so the n-th is the same in every run. The first run
is not disturbed; of the others, each is a list of moments (or {"share": of the first run's
seconds}), killed at each in turn and continued with --resume, as a user would. Prints what happened
as JSON. Sockets are forbidden."""
import builtins
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: E402, F401  an optimizer imports it: once here, not in each fork

import lib.args  # noqa: E402
import lib.run  # noqa: E402
import model  # noqa: E402
from tasks import queries  # noqa: E402


def no_sockets(event: str, args) -> None:
    if event.startswith("socket.") and event != "socket.__new__":
        raise RuntimeError(f"the network was used: {event} {args}")


class Clock:
    """Counts moments; at number `kill`, does what is to be done half-way, and kills the process."""

    def __init__(self, kill=None):
        self.kill, self.labels = kill, []

    def tick(self, label: str, half_way=lambda: None) -> None:
        self.labels.append(label)
        if len(self.labels) == self.kill:
            half_way()
            os.kill(os.getpid(), signal.SIGKILL)


def arm(stage, clock: Clock, order: Path) -> None:
    """Put the clock into what every stage calls; note each step's batch in `order`."""
    hidden, step, log = model.Qwen2.hidden, stage.clip_and_step, lib.run.Run.log
    fsync, replace, rmtree, builtin = os.fsync, os.replace, shutil.rmtree, queries.builtin

    def new_hidden(*args, **kwargs):
        clock.tick("forward")
        return hidden(*args, **kwargs)

    def new_step(*args):
        norm = step(*args)
        clock.tick("step")
        return norm

    def new_log(run, number, steps, bar, batch, **metrics):
        with builtins.open(order, "a") as file:
            file.write(json.dumps([number, batch]) + "\n")
        log(run, number, steps, bar, batch, **metrics)

        def torn():
            with builtins.open(run.log_file, "a") as file:
                file.write('{"step": 99, "los')
        clock.tick("log", torn)

    def new_fsync(fd):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        clock.tick(f"write {name}", lambda: name == "log.jsonl" or os.ftruncate(
            fd, os.fstat(fd).st_size // 2))
        fsync(fd)

    def new_replace(old, new):
        clock.tick(f"rename {Path(new).name}")
        replace(old, new)
        clock.tick(f"renamed {Path(new).name}")

    def new_rmtree(path, **kwargs):
        clock.tick("remove")
        clock.tick("remove half", lambda: [f.unlink() for f in Path(path).iterdir()])
        rmtree(path, **kwargs)
    model.Qwen2.hidden, stage.clip_and_step, lib.run.Run.log = new_hidden, new_step, new_log
    os.fsync, os.replace, shutil.rmtree = new_fsync, new_replace, new_rmtree
    queries.builtin = lambda split, n, seed=0: builtin(
        split, min(n, 3), seed
    )  # else it takes longer


def attempt(stage, args: dict, folder: Path, kill=None, share=None, seconds=0.0) -> int:
    """One process -> its exit code, 0 to 2 or -9. What it printed is in folder/output."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.addaudithook(no_sockets)
            clock = Clock(kill)
            arm(stage, clock, folder / "order")
            stage.main(stage.Args(**args))
            (folder / "moments").write_text(json.dumps(clock.labels))
            code = 0
        except lib.args.InputError as error:
            print(f"error: {error}")
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if share is not None:
        time.sleep(share * seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survive(stage, args: dict, folder: Path, kills: list, seconds: float) -> list[str]:
    """Kill at each moment in turn, continue as the messages say, until a run ends by itself."""
    told, resume = [], False
    folder.mkdir()
    args = args | {"out": str(folder / "run")}
    for kill in [*kills, None]:
        kill = kill if isinstance(kill, dict) else {"kill": kill}
        while True:
            code = attempt(stage, args | {"resume": resume}, folder, **kill, seconds=seconds)
            last = ((folder / "output").read_text().splitlines() or [""])[-1]
            if code == 2 and "not begun" in last and resume:
                told.append("started again")
                resume = False
                continue
            break
        if code == 2 and "it is finished" in last:
            told.append("was finished")
            break
        told.append({0: "finished", -9: "killed"}.get(code, f"{code}: {last}"))
        if code != -9:
            break
        resume = True
    return told


def main(job: dict) -> dict:
    stage, work = importlib.import_module(job["stage"]), Path(job["work"])
    started = time.time()
    told = [survive(stage, job["args"], work / "whole", [], 0.0)]
    seconds = time.time() - started
    moments = json.loads((work / "whole" / "moments").read_text())
    kills = choose(moments, job["kills"], job["seed"])
    told += [survive(stage, job["args"], work / f"kill{i}", kill, seconds)
             for i, kill in enumerate(kills)]
    return {"moments": moments, "kills": kills, "told": told, "seconds": seconds}


def choose(moments: list[str], n: int, seed: int) -> list[list]:
    """n lists of moments, all chosen by the seed: a quarter while a state is saved, a quarter
    while the stage finishes, one each before anything is written, before the first state, in a
    log line after it, and at a moment of the wall clock; the rest anywhere, every other one killed
    again after it was continued."""
    r, where = random.Random(seed), range(1, len(moments) + 1)
    last = max(i for i in where if moments[i - 1] == "log")
    state = [i for i in where if "state.pt" in moments[i - 1]]
    finish = [i for i in where if i > last and moments[i - 1] != "forward"]
    begun = moments.index("rename run.json") + 1
    kills = [[i] for i in r.sample(state, n // 4) + r.sample(finish, n // 4)]
    if n:
        kills += [[r.randint(1, begun)], [r.randint(begun + 1, state[0] - 1)],
                  [r.choice([i for i in where if moments[i - 1] == "log" and i > state[0]])],
                  [{"share": r.uniform(0.2, 0.9)}]]
    while len(kills) < n:
        kills.append([r.choice(where)] + [r.choice(where[:len(where) // 2])] * (len(kills) % 2))
    return kills


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
