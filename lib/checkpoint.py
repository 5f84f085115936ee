"""The published directory format: config.json and safetensors files, in and out.

The files use model.py's names, with one exception: a published MoE stores the three matrices of
each expert apart, and model.py stacks them. Everything that Qwen2 does not have is refused, since a
model that is nearly right would be silently wrong.
"""
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from lib.args import InputError, require
from lib.files import atomic_path, read_json, write_atomic
from lib.lora import adapters, merged_state_dict


class NoDraws(TorchFunctionMode):
    """Skip random initial weights: torch would load 80 MB of code to draw them on "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ != "normal_":  # of torch.nn.init, and of Tensor
            return function(*args, **(kwargs or {}))


def load_model(Model, Config, path: str | Path, dtype, device):
    """Return a `Model` with the configuration and the weights of a directory.

    Each weight is copied from its file to its place, so memory never holds the weights twice.
    Raises InputError if config.json describes anything but Qwen2, or if the names, shapes or types
    of the weights are not those of the model."""
    path = Path(path)
    config = read_config(path, Config)
    stored = find_weights(path, config)
    with NoDraws(), torch.device("meta"):
        model = Model(config)
    targets = published_weights(model)  # names and shapes: there is no memory behind them yet
    for name in sorted(targets.keys() ^ stored.keys()):
        what = "is missing" if name in targets else "does not belong to this architecture"
        raise InputError(f"{path}: weight {name} {what}")
    for name, target in targets.items():
        with open_weights(stored[name]) as opened:
            stored_shape = tuple(opened.get_slice(name).get_shape())
        shape = tuple(target.shape)
        require(stored_shape == shape, f"{stored[name]}: weight {name} has shape {stored_shape}, "
                f"but config.json implies {shape}")
    empty = {}
    for name, weight in model.state_dict().items():
        empty[name] = torch.empty(weight.shape, dtype=dtype, device=device)
    model.load_state_dict(empty, assign=True)
    targets = published_weights(model)
    found = {read_weight(target, stored[name], name) for name, target in targets.items()}
    if len(found) == 1 and found != {dtype}:
        model.config = replace(config, torch_dtype=dtype_name(found.pop()))
    return model.requires_grad_()


def save_model(model, path: str | Path, dtype: str = "") -> None:
    """Write the weights, then config.json. Each file replaces its older version in one step.

    dtype: "float32", "bfloat16" or "float16"; empty: that of the weights in memory."""
    path = Path(path)
    config = model.config
    require(not config.num_experts or config.shared_expert_intermediate_size,
            f"{path}: a Qwen2-MoE directory needs a shared expert")
    dtype = dtype or dtype_name(model.model.norm.weight.dtype)
    weights = {}
    for name, weight in published_weights(model).items():
        weights[name] = weight.to("cpu", getattr(torch, dtype)).contiguous()
    with atomic_path(path / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    # Of an earlier model in this directory: readers disagree on which of the two they prefer.
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    write_config(config, model.architecture, dtype, path)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------
# config.json

# What other architectures say in config.json, with the values that Qwen2 has. Other keys are
# ignored: transformers writes many that the forward pass does not read.
ONLY = {
    "hidden_act": "silu", "is_causal": True, "qkv_bias": True, "attention_bias": True,
    "mlp_bias": False, "qk_norm": False, "use_qk_norm": False, "use_mrope": False,
    "partial_rotary_factor": 1.0, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "quantization_config": None, "attention_dropout": 0.0,
}
ONLY_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None,
             "mscale": None, "mscale_all_dim": None}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rope_theta")
REQUIRED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size",
                "shared_expert_intermediate_size")
POSITIVE = ("max_position_embeddings", "rms_norm_eps", "decoder_sparse_step", "yarn_factor")
# Fields of Config that config.json stores in another form, or not as a property of the model.
ELSEWHERE = ("original_max_position_embeddings", "yarn_factor", "chunk_size", "local_size",
             "torch_dtype")
TYPES = {bool: (bool,), int: (int,), float: (int, float)}


def read_config(path: str | Path, Config):
    """Return the Config (model.py's dataclass) of a directory. Raises InputError for anything that
    Qwen2 does not have."""
    path = Path(path)
    require(path.is_dir(), f"{path}: no such directory; run the stage that writes it first")
    file = path / "config.json"
    require(file.is_file(), f"{path}: no config.json, so this is no model directory (if its run "
            "was stopped, continue it with --resume)")
    raw = read_json(file)
    try:
        kind = raw.get("model_type")
        require(kind in ("qwen2", "qwen2_moe"), f"model_type is {kind!r}, not qwen2 or qwen2_moe")
        check_only(ONLY, raw, "")
        values = {}
        for field in fields(Config):
            if field.name not in ELSEWHERE and raw.get(field.name) is not None:
                values[field.name] = raw[field.name]
        values["mlp_only_layers"] = tuple(values.get("mlp_only_layers", ()))
        values |= long_context(raw)
        check_values(values, Config, kind == "qwen2_moe")
        config = Config(**values)
        check_window(raw, config.max_position_embeddings)
        head_dim = raw.get("head_dim")
        require(head_dim in (None, config.head_dim),
                f"head_dim is {head_dim}, but Qwen2 has hidden_size / num_attention_heads")
        return config
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # InputError too
        raise InputError(f"{file}: {error}") from None


def check_only(only: dict, part: dict, where: str) -> None:
    """Refuse other values than those of `only` in a part of config.json. null is no value, except
    for the activation: transformers asks for one."""
    for name, allowed in only.items():
        value = part.get(name, allowed)
        if value is None and name != "hidden_act":
            continue
        require(value == allowed, f"{where}{name} is {value!r}, but Qwen2 has only {allowed!r}")


def check_window(raw: dict, n_positions: int) -> None:
    """Refuse a sliding window, unless it is switched off or as long as the longest text."""
    allowed = {"full_attention"}
    if raw.get("use_sliding_window"):
        window = raw.get("sliding_window", 0)
        require(window is None or window >= n_positions, "use_sliding_window is not supported "
                f"with a sliding_window ({window}) below the {n_positions} positions")
        allowed.add("sliding_attention")
    for layer_type in raw.get("layer_types") or ():
        require(layer_type in allowed, f"layer_types has {layer_type!r}, but Qwen2 has only "
                "full_attention")


def check_values(values: dict, Config, is_moe: bool) -> None:
    """Refuse missing values, wrong types, and numbers that are negative or not finite."""
    required = REQUIRED + REQUIRED_MOE if is_moe else REQUIRED
    for name in required:
        require(values.get(name) is not None, f"no {name}")
    for field in fields(Config):
        value = values.get(field.name, field.default)
        good = True
        if field.name == "mlp_only_layers":
            good = all(type(layer) is int for layer in value)
        elif field.type in TYPES:
            good = type(value) in TYPES[field.type] and 0 <= value < math.inf
            if field.name in required or field.name in POSITIVE:
                good = good and value > 0
        require(good, f"{field.name} is {value!r}")


def long_context(raw: dict) -> dict:
    """Return RoPE's theta, YaRN and dual chunk attention as fields of Config.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 writes both of them into
    rope_parameters."""
    forms = []
    for name in ("rope_scaling", "rope_parameters"):
        form = raw.get(name) or {}
        is_flat = isinstance(form, dict) and not any(isinstance(v, dict) for v in form.values())
        require(is_flat, f"{name} is no flat object")
        forms.append(form)
    rope = forms[0] or forms[1]
    chunks = raw.get("dual_chunk_attention_config") or {}
    # YaRN over a length that the model was not trained at would be silently wrong.
    length = the_only("original_max_position_embeddings", [raw, rope, chunks]) or 0
    values = {"rope_theta": the_only("rope_theta", [raw, *forms]),
              "original_max_position_embeddings": length}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "yarn"), f"rope scaling {kind!r} is not supported, only yarn")
    if kind == "yarn":
        check_only(ONLY_YARN, rope, "YaRN: ")
        require(isinstance(rope.get("factor"), (int, float)), "yarn without a factor")
        values["yarn_factor"] = float(rope["factor"])
        # Users turn on YaRN by adding rope_scaling alone; the model then has more positions.
        positions = raw.get("max_position_embeddings") or 0
        values["max_position_embeddings"] = max(positions, int(length * values["yarn_factor"]))
    if chunks:
        for name in ("chunk_size", "local_size"):
            require(name in chunks, f"dual_chunk_attention_config without {name}")
            values[name] = chunks[name]
    return values


def the_only(name: str, objects: list[dict]):
    """Return the value that these JSON objects give to a name. InputError if two values differ."""
    found = {part.get(name) for part in objects} - {None}
    require(len(found) < 2, f"several {name} {sorted(found)}")
    return found.pop() if found else None


def write_config(config, architecture: str, dtype: str, path: Path) -> None:
    """Write config.json, with RoPE in both forms, so that old and new readers agree."""
    is_moe = config.num_experts > 0
    names = [field.name for field in fields(config)]
    end = names.index(ELSEWHERE[0] if is_moe else "num_experts")
    values = {"architectures": [f"Qwen2{'Moe' if is_moe else ''}{architecture}"],
              "model_type": "qwen2_moe" if is_moe else "qwen2"}
    if architecture == "ForSequenceClassification":  # transformers counts these: one reward
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    for name in names[:end]:
        values[name] = getattr(config, name)
    if config.original_max_position_embeddings:
        values["original_max_position_embeddings"] = config.original_max_position_embeddings
    rope = {"rope_type": "default"}
    if config.yarn_factor > 1:
        rope = {"rope_type": "yarn", "factor": config.yarn_factor,
                "original_max_position_embeddings": config.trained_length}
        values["rope_scaling"] = rope | {"type": "yarn"}
    if config.chunk_size:
        values["dual_chunk_attention_config"] = {
            "chunk_size": config.chunk_size, "local_size": config.local_size,
            "original_max_position_embeddings": config.trained_length}
    values |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False,
               "rope_parameters": rope | {"rope_theta": config.rope_theta},
               "torch_dtype": dtype, "use_cache": True}
    write_atomic(path / "config.json", json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# weights

MAX_PIECE = 2**24  # bytes that are read at once


def find_weights(path: Path, config) -> dict[str, Path]:
    """Return published name -> file. Pickles are never read."""
    found = {}
    for file in weight_files(path):
        with open_weights(file) as opened:
            names = opened.keys()
        for name in names:
            require(name not in found, f"{file}: a second weight {name}")
            if ".rotary_emb." not in name:  # buffers of old checkpoints, computed anew here
                found[name] = file
    # Refuse an impossible size before it is built: nine tensors per layer, and the MLPs.
    layers = config.num_hidden_layers
    sparse = sum(config.is_sparse(layer) for layer in range(min(layers, len(found))))
    require(9 * layers + 3 * sparse * config.num_experts <= len(found), f"{path}: config.json has "
            f"{layers} layers, {sparse} of them of {config.num_experts} experts, but there are "
            f"only {len(found)} tensors")
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def open_weights(file: Path):
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file ({error})") from None


def read_weight(target: torch.Tensor, file: Path, name: str) -> torch.dtype:
    """Copy a stored weight into `target` and return the stored dtype.

    safetensors maps a file into memory, where all that was read stays until the file is closed. We
    therefore open it anew for every few rows."""
    where = f"{file}: weight {name}"
    rows = max(1, MAX_PIECE // target[0].nbytes)
    for start in range(0, len(target), rows):
        with open_weights(file) as opened:
            piece = opened.get_slice(name)[start:start + rows]
        require(piece.is_floating_point(), f"{where} is {piece.dtype}, not a floating-point type")
        target[start:start + rows].copy_(piece)
    lowest, highest = target.aminmax()  # 20 times as fast as isfinite().all(); NaN is kept
    require(math.isfinite(lowest) and math.isfinite(highest),
            f"{where} holds NaN or infinity (in {target.dtype})")
    return piece.dtype


def weight_files(path: Path) -> list[Path]:
    """Return model.safetensors, or the shards that an index names; each must be in `path`."""
    names = ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        file_of = read_json(index).get("weight_map")
        require(isinstance(file_of, dict), f"{index}: no weight_map")
        names = sorted({str(name) for name in file_of.values()})
    for name in names:
        require(Path(name).name == name and (path / name).is_file(), f"{path}: no {name}")
    return [path / name for name in names]


def published_weights(model) -> dict[str, torch.Tensor]:
    """Return published name -> weight. Each expert's gate, up and down projection is a view of the
    stacked matrices of model.py."""
    weights = {}
    for name, w in merged_state_dict(model).items():
        if ".experts." not in name:
            weights[model.on_disk.get(name, name)] = w
            continue
        experts, part = name.rsplit(".", 1)
        for e in range(model.config.num_experts):
            if part == "gate_up_proj":
                gate, up = w[e].chunk(2)
                weights[f"{experts}.{e}.gate_proj.weight"] = gate
                weights[f"{experts}.{e}.up_proj.weight"] = up
            else:
                weights[f"{experts}.{e}.down_proj.weight"] = w[e]
    return weights


# ---------------------------------------------------------------------------------------------
# adapters, in PEFT's format

def save_adapter(model, path: Path, base: str) -> None:
    """Write the adapters of a model that started from the directory `base`; PEFT reads them."""
    weights = {}
    targets = set()
    for name, adapter in adapters(model).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().cpu().contiguous()
        targets.add(name.split(".", 3)[3])  # such as mlp.up_proj: up_proj also names experts'
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": sorted(targets)}
    with atomic_path(path / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_atomic(path / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def adapter_chain(path: str | Path) -> list[Path]:
    """Return the directory of a model and, after it, those of the adapters to merge into it, in
    their order. `path` is the last: a model, or an adapter, whose base may be an adapter too."""
    chain = [Path(path)]
    while (chain[0] / "adapter_config.json").exists() and not (chain[0] / "config.json").exists():
        file = chain[0] / "adapter_config.json"
        base = read_json(file).get("base_model_name_or_path")
        require(isinstance(base, str) and base, f"{file} does not name its base model")
        require(Path(base) not in chain, f"{file}: {base} is the base of its own base")
        chain.insert(0, Path(base))
    return chain


def last_with_tokenizer(base: Path, adapters: list[Path]) -> Path:
    """Return the last of the adapters' directories that holds a tokenizer, or else the base's."""
    for path in reversed(adapters):
        if (path / "tokenizer.json").exists() or (path / "vocab.json").exists():
            return path
    return base


@torch.no_grad()
def merge_adapter(model, path: str | Path) -> None:
    """Add the adapter of a directory to the weights of its base model. Raises InputError for other
    kinds of adapters, and for one that does not fit the model."""
    config = read_json(Path(path) / "adapter_config.json")
    others = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
              "modules_to_save", "lora_bias")
    plain = config.get("bias", "none") == "none" and not any(config.get(name) for name in others)
    require(plain and config.get("peft_type") == "LORA",
            f"{path}: only plain LoRA of weights can be merged, see adapter_config.json")
    for name in ("lora_alpha", "r"):
        value = config.get(name)
        good = isinstance(value, (int, float)) and 0 < value < math.inf
        require(good, f"{path}/adapter_config.json: {name} is {value!r}, not a positive number")
    file = Path(path) / "adapter_model.safetensors"
    require(file.is_file(), f"{file}: no such file")
    with open_weights(file) as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}
    require(weights, f"{file} holds no adapter")
    for name, weight in weights.items():
        require(weight.float().isfinite().all(), f"{file}: weight {name} holds NaN or infinity")
    modules = dict(model.named_modules())
    for name in sorted({name.partition(".lora_")[0] for name in weights}):
        try:
            A = weights[f"{name}.lora_A.weight"].float()
            B = weights[f"{name}.lora_B.weight"].float()
            weight = modules[name.removeprefix("base_model.model.")].weight
            out_features, in_features = weight.shape
        except (KeyError, AttributeError, ValueError):
            raise InputError(f"{path}: {name} does not fit the base model") from None
        r = config["r"]
        require(A.shape == (r, in_features) and B.shape == (out_features, r),
                f"{path}: {name} does not fit the base model, or r is not {r}")
        delta = config["lora_alpha"] / r * (B @ A)
        weight.add_(delta.to(weight.device))
