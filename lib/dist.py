"""The same program in N processes: `torchrun --nproc_per_node=N stage.py ...`.

Each process keeps 1/N of every weight, gradient and optimizer state (FSDP2: a block's weights are
gathered just before it is used) and runs its share of a step's rows. A loss is divided by the count
of the whole step, so gradients and losses are *summed* over processes, and N processes with
--micro_batch m take the steps of one with --micro_batch N*m. With one process, every function here
gives back what it was given: who never uses torchrun need not read this file.
"""
import atexit
import contextlib
import os
import pickle
import re
import shutil

import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = True if RANK else None  # for tqdm: only the first process shows bars, if on a terminal
store = None  # torchrun's, which outlives a process that is killed


def init_distributed() -> None:
    """Meet the others. When one has died, torchrun ends all by SIGTERM."""
    global store
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = next(dist.rendezvous("env://"))[0]
        dist.init_process_group(store=store, rank=RANK, world_size=WORLD)
        atexit.register(dist.destroy_process_group)


def is_first_to_report() -> bool:
    """Of the processes that come here, is this the first? It tells the user why the run ends."""
    return store is None or store.add("came", 1) == 1


def is_peer_failure(error: BaseException) -> bool:
    """Does this say that another process is gone?"""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def micro_batches(rows: list, size: int):
    """This process's parts of a step's rows, at most `size` each. Processes compute in step, so all
    get as many, and of rows sorted by length they get neighbours at the same time."""
    for i in range(0, len(rows), size * WORLD):
        part = rows[i:i + size * WORLD]
        n = len(part) // WORLD
        yield part[RANK * n:(RANK + 1) * n]


def rank_slice(rows: list) -> list:
    """This process's part of what needs no other process: every WORLD-th row."""
    return rows[RANK::WORLD]


def all_gather(x) -> list:
    """Every process's x, in the order of their ranks."""
    parts = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, x)
    return parts


def gather_rows(rows: list) -> list:
    """The inverse of `share`: all rows in their order, on every process."""
    parts = all_gather(rows)
    out = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        out[rank::WORLD] = part
    return out


def all_reduce_sum(x):
    """The sum over processes of a number, a tensor, or each value of a dict."""
    if WORLD == 1:
        return x
    if isinstance(x, dict):
        return {key: all_reduce_sum(value) for key, value in x.items()}
    total = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total if torch.is_tensor(x) else total.item()


def apply_fsdp(model, autocast):
    """Cut the weights over the processes, in place: one unit a block, and one for the rest. Blocks
    are gathered in autocast's dtype: it would keep a copy in it of every weight it casts."""
    if WORLD > 1:
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
        mesh = dist.init_device_mesh(model.head_weight.device.type, (WORLD,))
        policy = MixedPrecisionPolicy(autocast.fast_dtype, torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        for part in (*model.model.layers, model):
            part.set_gradient_divide_factor(1.0)  # the sum, not the mean
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other
        register_fsdp_forward_method(model, "hidden")
    return model


def full_model(model, device=None):
    """A model that has all its weights here: to sample, where processes need different numbers of
    forward passes, to evaluate and to save."""
    if WORLD == 1:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    weights = {name: w.full_tensor().to(device) for name, w in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy


def shard_like(tensor, like):
    """A tensor that all processes have -> the parts of it that go with the parts of `like`."""
    if WORLD == 1:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def reasons():
    """The checkpoint library's error is no Exception: raise that of one process instead."""
    try:
        yield
    except dist.checkpoint.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def save_state(path, model, optimizer, **numbers) -> None:
    """Each process writes its own part into the directory `path`; .metadata, the last file, makes
    it a state, and only then older ones go."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, states = get_state_dict(model, optimizer)
    with reasons():
        dist.checkpoint.save({"model": weights, "optimizer": states, **numbers}, checkpoint_id=path)
    for old in path.parent.iterdir():
        if RANK == 0 and old != path:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


class Metadata(pickle.Unpickler):
    """What lies where, and the numbers, are pickles to the checkpoint library, which could run any
    code. Looked through before it reads them: nothing but its own classes may be named."""

    def find_class(self, module, name):
        if re.fullmatch(r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo)"
                        r"|torch\.(Size|float32|serialization\._get_layout)"
                        r"|pathlib(\._local)?\.(Posix|Windows)Path", f"{module}.{name}"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def load_state(path, model, optimizer) -> dict:
    """Read by any number of processes, each its own part, whatever their number was."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            torch.load(value, weights_only=True)
            value.seek(0)
            super().load_bytes(read_item, value)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "step": 0, "seconds": 0.0}
    with open(path / ".metadata", "rb") as file:
        Metadata(file).load()
    with reasons():
        dist.checkpoint.load(state, checkpoint_id=path, planner=Planner())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return state


def cut_state(state: dict, model, optimizer) -> dict:
    """The whole state, as one process saves it -> this process's part."""
    if WORLD == 1:
        return state
    own, params = model.state_dict(), [p for g in optimizer.param_groups for p in g["params"]]
    state["model"] = {name: shard_like(w, own[name]) for name, w in state["model"].items()}
    for i, values in state["optimizer"]["state"].items():
        values |= {
            k: shard_like(x, params[i]) for k, x in values.items() if x.shape == params[i].shape
        }
    return state
