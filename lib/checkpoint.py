"""The published directory format: config.json and safetensors files, in and out.

The files use model.py's names, with one exception: a published MoE stores the three matrices of
each expert apart, and model.py stacks them. Everything that Qwen2 does not have is refused, since a
model that is nearly right would be silently wrong.
"""
import json
import math
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.args import InputError, require
from lib.files import atomic_path, read_json, write_atomic


def load_model(Model, Config, path: str | Path, dtype, device):
    """Return a `Model` with the configuration and the weights of a directory.

    Raises InputError if config.json describes anything but Qwen2, or if the names, shapes or types
    of the weights are not those of the model."""
    config = read_config(path, Config)
    weights = read_weights(path, config)
    for ours, published in Model.on_disk.items():
        if published in weights:
            weights[ours] = weights.pop(published)
    with torch.device("meta"):
        model = Model(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        what = "is missing" if name in expected else "does not belong to this architecture"
        raise InputError(f"{path}: weight {name} {what}")
    for name, tensor in weights.items():
        where = f"{path}: weight {name}"
        require(tensor.is_floating_point(), f"{where} is {tensor.dtype}, not a floating-point type")
        found = tuple(tensor.shape)
        shape = tuple(expected[name].shape)
        require(found == shape, f"{where} has shape {found}, but config.json implies {shape}")
        tensor = tensor.to(device=device, dtype=dtype)
        lowest, highest = tensor.aminmax()  # 20 times as fast as isfinite().all(); NaN is kept
        require(math.isfinite(lowest) and math.isfinite(highest),
                f"{where} holds NaN or infinity (in {dtype})")
        weights[name] = tensor
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def save_model(model, path: str | Path) -> None:
    """Write the weights, then config.json. Each file replaces its older version in one step."""
    path = Path(path)
    weights = {}
    for name, weight in split_experts(model.state_dict(), model.config).items():
        weights[model.on_disk.get(name, name)] = weight.detach().cpu().contiguous()
    with atomic_path(path / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    # Of an earlier model in this directory: readers disagree on which of the two they prefer.
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_config(model.config, model.architecture, dtype, path)


# ---------------------------------------------------------------------------------------------
# config.json

# What other architectures say in config.json, with the values that Qwen2 has. Other keys are
# ignored: transformers writes many that the forward pass does not read.
ONLY = {
    "hidden_act": ("silu",), "is_causal": (True, None), "qkv_bias": (True, None),
    "attention_bias": (True, None), "mlp_bias": (False, None), "qk_norm": (False, None),
    "use_qk_norm": (False, None), "use_mrope": (False, None),
    "partial_rotary_factor": (1.0, None), "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "quantization_config": (None,),
}
ONLY_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None,
             "mscale": None, "mscale_all_dim": None}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rope_theta")
REQUIRED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
POSITIVE = ("max_position_embeddings", "rms_norm_eps", "decoder_sparse_step", "yarn_factor")
# Fields of Config that config.json stores in another form.
LONG_CONTEXT = ("original_max_position_embeddings", "yarn_factor", "chunk_size", "local_size")
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
        check_architecture(raw)
        values = {}
        for field in fields(Config):
            if field.name not in LONG_CONTEXT and raw.get(field.name) is not None:
                values[field.name] = raw[field.name]
        values["mlp_only_layers"] = tuple(values.get("mlp_only_layers", ()))
        values |= long_context(raw)
        check_values(values, Config, raw["model_type"] == "qwen2_moe")
        config = Config(**values)
        check_window(raw, config.max_position_embeddings)
        head_dim = raw.get("head_dim")
        require(head_dim in (None, config.head_dim),
                f"head_dim is {head_dim}, but Qwen2 has hidden_size / num_attention_heads")
        return config
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # InputError too
        raise InputError(f"{file}: {error}") from None


def check_architecture(raw: dict) -> None:
    """Refuse what other models have and Qwen2 has not."""
    kind = raw.get("model_type")
    require(kind in ("qwen2", "qwen2_moe"), f"model_type is {kind!r}, not qwen2 or qwen2_moe")
    for name, allowed in ONLY.items():
        value = raw.get(name, allowed[0])
        require(value in allowed, f"{name} is {value!r}, but Qwen2 has only {allowed[0]!r}")
    for name, value in raw.items():
        require("dropout" not in name or value in (0.0, None), f"{name} is {value!r}, but Qwen2 "
                "trains without dropout")


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
    types = {field.name: TYPES.get(field.type) for field in fields(Config)}
    for name, value in values.items():
        if name == "mlp_only_layers":
            good = all(type(layer) is int for layer in value)
        elif name in required or name in POSITIVE:
            good = type(value) in types[name] and 0 < value < math.inf
        else:
            good = type(value) in types[name] and 0 <= value < math.inf
        require(good, f"{name} is {value!r}")


def long_context(raw: dict) -> dict:
    """Return RoPE's theta, YaRN and dual chunk attention as fields of Config.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 writes both of them into
    rope_parameters."""
    forms = []
    for name in ("rope_scaling", "rope_parameters"):
        form = raw.get(name) or {}
        require(isinstance(form, dict), f"{name} is no flat object")
        require(not any(isinstance(v, dict) for v in form.values()), f"{name} is no flat object")
        forms.append(form)
    thetas = {form.get("rope_theta") for form in (*forms, raw)} - {None}
    require(len(thetas) < 2, f"several rope_theta {sorted(thetas)}")
    values = {"rope_theta": thetas.pop() if thetas else None}
    lengths = {raw.get("original_max_position_embeddings")}  # training lengths

    rope = forms[0] or forms[1]
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "yarn"), f"rope scaling {kind!r} is not supported, only yarn")
    if kind == "yarn":
        for name, only in ONLY_YARN.items():
            value = rope.get(name)
            require(value in (only, None),
                    f"yarn with {name} {value} is not supported, only {only}")
        require(isinstance(rope.get("factor"), (int, float)), "yarn without a factor")
        values["yarn_factor"] = float(rope["factor"])
        lengths.add(rope.get("original_max_position_embeddings"))
    chunks = raw.get("dual_chunk_attention_config")
    if chunks:
        for name in ("chunk_size", "local_size"):
            require(isinstance(chunks.get(name), int),
                    f"dual_chunk_attention_config without {name}")
            values[name] = chunks[name]
        lengths.add(chunks.get("original_max_position_embeddings"))

    # YaRN over a length that the model was not trained at would be silently wrong.
    lengths.discard(None)
    require(len(lengths) < 2, f"several training lengths {sorted(lengths)} "
            "(original_max_position_embeddings)")
    length = lengths.pop() if lengths else 0
    values["original_max_position_embeddings"] = length
    if kind == "yarn":
        # Users turn on YaRN by adding rope_scaling alone; the model then has more positions.
        positions = raw.get("max_position_embeddings") or 0
        values["max_position_embeddings"] = max(positions, int(length * values["yarn_factor"]))
    return values


def write_config(config, architecture: str, dtype: str, path: Path) -> None:
    """Write config.json, with RoPE in both forms, so that old and new readers agree."""
    is_moe = config.num_experts > 0
    names = [field.name for field in fields(config)]
    end = names.index(LONG_CONTEXT[0] if is_moe else "num_experts")
    values = {"architectures": [f"Qwen2{'Moe' if is_moe else ''}{architecture}"],
              "model_type": "qwen2_moe" if is_moe else "qwen2"}
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

def read_weights(path: str | Path, config) -> dict[str, torch.Tensor]:
    """Return all weights of a directory under model.py's names. Pickles are never read."""
    weights = {}
    for file in weight_files(Path(path)):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: not a safetensors file ({error})") from None
        for name, tensor in tensors.items():
            # torch.compile and DistributedDataParallel put their names before those of the model.
            name = name.replace("_orig_mod.", "").removeprefix("module.")
            require(name not in weights, f"{file}: a second weight {name}")
            if ".rotary_emb." not in name:  # buffers of old checkpoints, computed anew here
                weights[name] = tensor
    check_size(config, len(weights), path)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return fuse_experts(weights, config, path)


def check_size(config, n_tensors: int, path) -> None:
    """Refuse a config.json with more layers or experts than the files hold, before it is built."""
    layers = config.num_hidden_layers
    require(9 * layers <= n_tensors,  # seven of attention, two norms
            f"{path}: config.json has {layers} layers, but there are only {n_tensors} tensors")
    sparse = sum(config.is_sparse(layer) for layer in range(layers))
    require(3 * sparse * config.num_experts <= n_tensors, f"{path}: config.json has {sparse} "
            f"layers of {config.num_experts} experts, but there are only {n_tensors} tensors")


def weight_files(path: Path) -> list[Path]:
    """Return model.safetensors, or the shards that an index names; each must be in `path`."""
    names = ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        file_of = read_json(index).get("weight_map")
        is_map = isinstance(file_of, dict) and all(isinstance(f, str) for f in file_of.values())
        require(is_map, f"{index}: no weight_map")
        names = sorted(set(file_of.values()))
    for name in names:
        require(Path(name).name == name and (path / name).is_file(), f"{path}: no {name}")
    return [path / name for name in names]


def split_experts(weights: dict, config) -> dict:
    """Return the weights with each expert's gate, up and down projection apart, as published."""
    out = {}
    for name, w in weights.items():
        if ".experts." not in name:
            out[name] = w
            continue
        experts, part = name.rsplit(".", 1)
        for e in range(config.num_experts):
            if part == "gate_up_proj":
                gate, up = w[e].chunk(2)
                out[f"{experts}.{e}.gate_proj.weight"] = gate
                out[f"{experts}.{e}.up_proj.weight"] = up
            else:
                out[f"{experts}.{e}.down_proj.weight"] = w[e]
        if part == "down_proj" and not config.shared_expert_intermediate_size:
            # transformers requires a shared expert all the same, with an inner size of 0.
            shared = experts.removesuffix("experts") + "shared_expert"
            C = config.hidden_size
            out[f"{shared}.gate_proj.weight"] = w.new_empty(0, C)
            out[f"{shared}.up_proj.weight"] = w.new_empty(0, C)
            out[f"{shared}.down_proj.weight"] = w.new_empty(C, 0)
            out[f"{shared}_gate.weight"] = w.new_zeros(1, C)
    return out


def fuse_experts(weights: dict, config, path) -> dict:
    """Stack the experts: the inverse of `split_experts`."""
    for layer in range(config.num_hidden_layers):
        if not config.is_sparse(layer):
            continue
        experts = f"model.layers.{layer}.mlp.experts"
        stacked = {}
        for part in ("gate", "up", "down"):
            names = [f"{experts}.{e}.{part}_proj.weight" for e in range(config.num_experts)]
            for name in names:
                require(name in weights, f"{path}: weight {name} is missing")
            tensors = [weights.pop(name) for name in names]
            shapes = {tuple(tensor.shape) for tensor in tensors}
            require(len(shapes) == 1, f"{path}: {experts} have several shapes {sorted(shapes)}")
            stacked[part] = torch.stack(tensors)
        require(stacked["gate"].shape == stacked["up"].shape,
                f"{path}: {experts} have several shapes")
        weights[f"{experts}.gate_up_proj"] = torch.cat((stacked["gate"], stacked["up"]), dim=1)
        weights[f"{experts}.down_proj"] = stacked["down"]
    return weights
