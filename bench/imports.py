"""How long `import model` takes beside `import torch`, and a peer's own: a process each.

The interpreter's start is not counted. `sample` is what GRPO imports to generate.
"""
import importlib

import harness
from harness import memory, timed


def load(*names):
    def fn(_):
        before = memory()
        out = timed(lambda: [importlib.import_module(name) for name in names], repeats=1, warmup=0)
        return out | {"extra": {"CPU s": out["cpu"], "MB": memory() - before}}
    return fn


def mine(name):
    def fn(case):
        harness.ours()
        return load(name)(case)
    return fn


SYSTEMS = {"ours model": (mine("model"), None), "ours sample": (mine("sample"), None),
           "transformers Qwen2": (load("transformers.models.qwen2.modeling_qwen2"),
                                   "transformers"),
           "TRL GRPOTrainer": (load("trl.trainer.grpo_trainer"), "trl"),
           "torch": (load("torch"), None)}
CASES = {"import": list(SYSTEMS)}

if __name__ == "__main__":
    harness.main("Imports", "imports", SYSTEMS, CASES)
