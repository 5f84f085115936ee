"""The same program in N processes: `torchrun --nproc_per_node=N stage.py ...`.

With one process they change nothing, except that `micro_batches` cuts a step into its parts. If you
never use torchrun, skip this file.

Each process keeps 1/N of every weight, gradient and optimizer state (FSDP2 gathers the weights of a
block just before the block is used), and computes its share of the rows of a step. A loss is
divided by the count of the whole step, so gradients and losses are *summed* over processes: N
processes with --micro_batch m take the same steps as one process with --micro_batch N*m.
"""
import atexit
import os

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
QUIET = True if RANK else None  # for tqdm: only the first process shows bars, if on a terminal
store = None  # torchrun's key-value store, which outlives a process that is killed


# ---------------------------------------------------------------------------------------------
# processes

def init_distributed() -> None:
    """Connect to the other processes. When one of them dies, torchrun ends all by SIGTERM."""
    global store
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = next(dist.rendezvous("env://"))[0]
        dist.init_process_group(store=store, rank=RANK, world_size=WORLD)
        atexit.register(dist.destroy_process_group)


def is_first_to_report() -> bool:
    """Return True in the first process that calls this: it tells the user why the run ends."""
    return store is None or store.add("reports", 1) == 1


def is_peer_failure(error: BaseException) -> bool:
    """Return whether the error says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


# ---------------------------------------------------------------------------------------------
# rows and numbers

def micro_batches(rows: list, size: int, model):
    """Yield this process's part of each micro-batch, at most `size` rows.

    All processes get equally many rows, since they compute in lockstep. Of rows that are sorted by
    length, they compute neighbours at the same time. The gradients of `model` are summed over the
    processes once, after the last micro-batch."""
    for i in range(0, len(rows), size * WORLD):
        if WORLD > 1:
            model.set_requires_gradient_sync(i + size * WORLD >= len(rows))
        together = rows[i:i + size * WORLD]
        n = len(together) // WORLD
        yield together[RANK * n:(RANK + 1) * n]


def rank_slice(rows: list) -> list:
    """Return every WORLD-th row: this process's part of work that needs no other process."""
    return rows[RANK::WORLD]


def all_gather(x) -> list:
    """Return every process's x, in the order of their ranks."""
    parts = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, x)
    return parts


def gather_rows(rows: list) -> list:
    """Return all rows in their order, on every process: the inverse of `rank_slice`."""
    parts = all_gather(rows)
    out = [None] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        out[rank::WORLD] = part
    return out


def all_reduce_sum(x):
    """Return the sum over processes of a number, a tensor, or each value of a dict."""
    if WORLD == 1:
        return x
    if isinstance(x, dict):
        return {key: all_reduce_sum(value) for key, value in x.items()}
    if torch.is_tensor(x):
        total = x.clone()
        dist.all_reduce(total)
        return total
    total = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


# ---------------------------------------------------------------------------------------------
# weights

def apply_fsdp(model, autocast):
    """Shard the weights over the processes, in place: one unit per block, and one for the rest.

    A block is gathered in autocast's dtype, or autocast would keep one more copy of each weight."""
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
    """Return a model with all weights: to sample, where processes need different numbers of forward
    passes, to evaluate, and to save."""
    if WORLD == 1:
        return model
    from lib.lora import adapters, add_lora  # lib.lora imports lib.args, which imports this file
    with torch.device("meta"):
        copy = type(model)(model.config)
    for adapter in list(adapters(model).values())[:1]:
        add_lora(copy, adapter.rank, adapter.alpha)
    weights = {name: w.full_tensor().to(device) for name, w in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy


def shard_like(tensor, like):
    """Return this process's part of a tensor that all processes have, sharded as `like` is."""
    if WORLD == 1:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------
# the training state

def full_state(model, optimizer) -> dict:
    """Return the state of model and optimizer with whole tensors, in the first process's memory.

    The others get tensors without data. One file can then hold the state of any number of
    processes; the first needs 12 bytes of CPU memory per parameter."""
    def full(value):
        if WORLD == 1 or not hasattr(value, "full_tensor"):
            return value
        return value.full_tensor().to("meta" if RANK else "cpu")

    weights = {name: full(w) for name, w in model.state_dict().items()}
    saved = optimizer.state_dict()
    moments = {}
    for i, values in saved["state"].items():
        moments[i] = {name: full(value) for name, value in values.items()}
    return {"model": weights, "optimizer": saved | {"state": moments}}


def load_full_state(state: dict, model, optimizer) -> None:
    """Load what `full_state` returned; every process keeps its own part."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(w, own[name]) for name, w in state["model"].items()})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if value.shape == params[i].shape:  # a moment, not the step count
                values[name] = shard_like(value, params[i])
    optimizer.load_state_dict(state["optimizer"])
