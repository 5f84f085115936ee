"""Show the numbers of runs in TensorBoard, while they train or afterwards.

    pip install tensorboard
    python recipes/to_tensorboard.py runs/demo/sft runs/demo/dpo &    # ends when these runs end
    tensorboard --logdir runs                                         # http://localhost:6006

For Weights & Biases (tried offline, wandb 0.31), replace the writers by `wandb.init(name=folder,
reinit="create_new")`, `writer.add_scalar(name, value, step)` by `writer.log({name: value},
step=step)`, and drop `writer.flush()`. No stage needs to know of either.
"""
import json
import sys
import time
from pathlib import Path


def new_rows(log_file: Path, after: int) -> list[tuple[int, dict[str, float]]]:
    """Return (step, {name: number}) of the lines of a log.jsonl behind step `after`.

    The file is read from its start, since a resumed run cuts its log first. The last line may be
    half written. Lists and texts have no curve."""
    rows = []
    for line in log_file.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            step = row.pop("step")
            if step > after:
                numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
                rows.append((step, numbers))
    return rows


def main(folders: list[str]) -> None:
    from torch.utils.tensorboard import SummaryWriter
    writers = {folder: SummaryWriter(f"{folder}/tensorboard") for folder in folders}
    last_step = dict.fromkeys(folders, 0)
    running = True
    while running:
        records = [json.loads(Path(folder, "run.json").read_text("utf-8")) for folder in folders]
        for folder, writer in writers.items():
            for step, numbers in new_rows(Path(folder, "log.jsonl"), last_step[folder]):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
                last_step[folder] = step
            writer.flush()
        running = not all(record["finished"] for record in records)
        time.sleep(5 * running)


if __name__ == "__main__":
    main(sys.argv[1:])
