"""The files of a tokenizer: Hugging Face's (HF) four and tiktoken's one; tiktoken itself.

    tokenizer.json          the whole tokenizer: pattern, vocabulary, merges, control tokens
    vocab.json, merges.txt  the vocabulary and the merges again, for older programs
    tokenizer_config.json   what transformers adds: its class, the chat template, pad and end
    qwen.tiktoken           one base64 token and its rank per line; no control tokens

A directory's own files are kept as texts and written again as they were.
"""
import base64
import json
import unicodedata
from operator import itemgetter
from pathlib import Path

import tiktoken

from lib.args import InputError, require
from lib.files import read_json, write_atomic

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# A pattern from elsewhere could take years for a word, or break tiktoken. The second is GPT-2's
# with single digits, for SmolLM2: no smaller pretrained model comes in Qwen2's format.
KNOWN_PATTERNS = (
    PATTERN, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# Why a vocabulary file looks garbled: JSON holds text, but tokens are bytes, and many are not valid
# UTF-8 (a third of a Chinese character). GPT-2 writes each byte as one printable character. Bytes
# that print stand for themselves; the other 68 move to U+0100 and up. A space shows as Ġ (U+0120),
# a newline as Ċ, "世" (bytes E4 B8 96) as ä¸ĸ. The ids 0-255 are in this order.
_PRINT = list(range(0x21, 0x7F)) + list(range(0xA1, 0xAD)) + list(range(0xAE, 0x100))
_NO_PRINT = [b for b in range(256) if b not in _PRINT]
BYTE_ORDER = _PRINT + _NO_PRINT
_TO_PRINT = dict(zip(BYTE_ORDER, _PRINT + list(range(0x100, 0x144)), strict=True))
_FROM_PRINT = {c: b for b, c in _TO_PRINT.items()}


def printable(token: bytes) -> str:
    """Return the spelling of vocab.json and merges.txt: b" caf\\xc3\\xa9" -> "ĠcafÃ©"."""
    return token.decode("latin-1").translate(_TO_PRINT)


def unprintable(text: str) -> bytes:
    """Return the bytes of such a spelling. KeyError for a character that spells no byte."""
    return bytes([_FROM_PRINT[ord(c)] for c in text])


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Turn token -> rank, all that a .tiktoken file has, into merges.

    BPE on a token's own bytes, with the ranks below its own, must end in two parts; InputError if
    it does not. tiktoken merges any neighbours that together are a token, HF only listed pairs.
    They agree on every text: the steps inside a token do not depend on what stands around it."""
    merges = []
    for token, limit in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = zip(parts, parts[1:], strict=False)
            pair_ranks = [ranks.get(a + b, limit) for a, b in pairs]
            lowest = min(pair_ranks)
            require(lowest < limit, f"token {limit} ({token!r}) cannot be built by merges")
            at = pair_ranks.index(lowest)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tiktoken_encoding(tokens: dict[bytes, int], merges: list, pattern: str,
                      n_vocab: int) -> tiktoken.Encoding:
    """Return tiktoken's BPE. Its priority is the id, so merges in any other order are refused. A
    token that no merge makes keeps its id, but is never the result of encoding."""
    ranks = {token: i for token, i in tokens.items() if len(token) == 1}
    last = -1
    for a, b in merges:
        made = tokens.get(a + b, -1)
        require(made > last, "the merges are not in the order of the ids they make")
        ranks[a + b] = made
        last = made
    # Some vocabularies lack bytes that clean text hardly has, and tiktoken would abort there. They
    # get ids from n_vocab on, which the tokenizer drops, as HF does.
    for b in range(256):
        ranks.setdefault(bytes([b]), n_vocab + b)
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------------
# reading: each function returns arguments of tokenizer.Tokenizer

def read_tiktoken(path: Path) -> dict:
    """Read a .tiktoken file."""
    tokens = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        tokens[base64.b64decode(token, validate=True)] = int(rank)
    return {"tokens": tokens, "merges": merges_from_ranks(tokens)}


def read_directory(path: Path, control_tokens: list[str]) -> dict:
    """Read tokenizer.json, or vocab.json and merges.txt where there is none."""
    files = {}
    for name in (*MADE, *KEPT):
        if (path / name).is_file():
            content = (path / name).read_bytes()
            try:
                files[name] = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"{path / name}: not UTF-8 text ({error.reason})") from None
    config = {}
    if "tokenizer_config.json" in files:
        config = read_json(path / "tokenizer_config.json")
    listed = []
    for i, token in config.get("added_tokens_decoder", {}).items():
        listed.append({**token, "id": int(i)})
    if "tokenizer.json" in files:
        parts = read_tokenizer_json(path / "tokenizer.json", control_tokens)
    else:
        merges = (path / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
        if merges[0].startswith("#version"):
            merges = merges[1:]
        parts = from_spelling(read_json(path / "vocab.json"), merges, listed, control_tokens)
    ids = {token["content"]: token["id"] for token in parts["added"] or ()}
    for token in listed:
        name, i = token["content"], token["id"]
        require(ids.get(name) == i, f"tokenizer.json has no token {name!r} with the id {i}, but "
                "tokenizer_config.json has")
    if "generation_config.json" in files and "<|im_end|>" in ids:
        add_stop_id(files, ids["<|im_end|>"])
    # transformers prefers the file to the key.
    template = files.get("chat_template.jinja", config.get("chat_template"))
    if template is not None:
        parts["chat_template"] = template
    return parts | {"files": files}


def read_tokenizer_json(path: Path, control_tokens: list[str]) -> dict:
    """Read tokenizer.json. InputError for steps that we do not have: a tokenizer that is nearly
    right would train a model on wrong ids without a word."""
    data = read_json(path)
    steps = data["pre_tokenizer"].get("pretokenizers", [])
    normalizer = data["normalizer"]
    if normalizer is not None and len(normalizer.get("normalizers", ())) == 1:
        normalizer = normalizer["normalizers"][0]
    known = "only NFC, Split(regex, isolated), ByteLevel are known, as in Qwen2.5"
    require(normalizer in (None, {"type": "NFC"}), known)
    require([step["type"] for step in steps] == ["Split", "ByteLevel"], known)
    split, byte_level = steps
    require(split["behavior"] == "Isolated" and not split["invert"], known)
    require(not byte_level["use_regex"] and not byte_level["add_prefix_space"], known)
    pattern = split["pattern"]["Regex"]
    require(pattern in KNOWN_PATTERNS, "the pre-tokenizer's pattern is not Qwen2's")
    parts = from_spelling(data["model"]["vocab"], data["model"]["merges"], data["added_tokens"],
                          control_tokens)
    return parts | {"pattern": pattern, "nfc": normalizer is not None}


def from_spelling(vocab: dict[str, int], merges: list, added: list[dict],
                  control_tokens: list[str]) -> dict:
    """Turn printable spellings into bytes. Without added tokens, the names of control_tokens in the
    vocabulary are taken for them."""
    if not added:
        added = [{"content": name, "id": vocab[name]} for name in control_tokens if name in vocab]
    for token in added:
        name = token["content"]
        odd = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        require(not odd, f"added token {name!r}: {odd} is not supported")
        require(name and unicodedata.is_normalized("NFC", name),
                f"added token {name!r} must be some text in Unicode NFC")
    # Some, such as SmolLM2, list the control tokens inside the vocabulary too.
    names = {token["content"] for token in added}
    tokens = {unprintable(text): i for text, i in vocab.items() if text not in names}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    merges = [(unprintable(a), unprintable(b)) for a, b in pairs]
    return {"tokens": tokens, "added": added or None, "merges": merges}


def add_stop_id(files: dict[str, str], im_end_id: int) -> None:
    """Add <|im_end|> to the stop ids of generation_config.json, where a base model lacks it: its
    chats would never end. Everything else in the file stays."""
    config = json.loads(files["generation_config.json"])
    require(isinstance(config, dict), "generation_config.json must be a JSON object")
    stops = config.get("eos_token_id")
    if not isinstance(stops, list):
        stops = [] if stops is None else [stops]
    if im_end_id not in stops:
        config["eos_token_id"] = [im_end_id, *stops]
        files["generation_config.json"] = to_json(config)


# ---------------------------------------------------------------------------------------------
# writing

# What `write_files` makes for a new tokenizer, and what else it keeps of a directory.
MADE = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "generation_config.json")
KEPT = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja")


def write_files(tokenizer, directory: Path) -> None:
    """Write the files of the directory that the tokenizer comes from, and what it lacked, each
    atomically."""
    files = make_files(tokenizer) | tokenizer.files
    for name, text in files.items():
        write_atomic(directory / name, text)
    for name in KEPT:  # an older save's, now contradicted
        if name not in files:
            (directory / name).unlink(missing_ok=True)


def to_json(content) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def make_files(tokenizer) -> dict[str, str]:
    """Return the text of each file of MADE."""
    merges = [f"{printable(a)} {printable(b)}" for a, b in tokenizer.merges]
    vocab = {printable(token): i for token, i in tokenizer.tokens.items()}
    # Control tokens below the last regular id must be in the vocabulary, or HF renumbers them.
    last = max(tokenizer.tokens.values())
    vocab |= {name: i for name, i in tokenizer.special.items() if i < last}
    added = {}
    for token in sorted(tokenizer.added, key=itemgetter("id")):
        added[token["id"]] = {
            "content": token["content"], "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": token.get("normalized", False), "special": token.get("special", True)}
    generation = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    return {"tokenizer.json": to_json(tokenizer_json(tokenizer, vocab, merges, added)),
            "tokenizer_config.json": to_json(tokenizer_config(tokenizer, added)),
            "vocab.json": to_json(vocab),
            "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
            "generation_config.json": to_json(generation)}


def tokenizer_json(tokenizer, vocab: dict, merges: list[str], added: dict) -> dict:
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "vocab": vocab, "merges": merges},
    }


def tokenizer_config(tokenizer, added: dict) -> dict:
    # transformers' Qwen2Tokenizer builds Qwen's pipeline whatever tokenizer.json says.
    is_qwen = tokenizer.pattern == PATTERN and tokenizer.nfc
    hidden = [name for name in tokenizer.special
              if name in tokenizer.hidden and name != "<|endoftext|>"]
    return {
        "tokenizer_class": "Qwen2Tokenizer" if is_qwen else "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "chat_template": tokenizer.chat_template,
        "additional_special_tokens": hidden,
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": added[tokenizer.pad_id]["content"],
        "add_prefix_space": False,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
