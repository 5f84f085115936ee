"""The files of a tokenizer: Hugging Face's (HF) four and tiktoken's one; tiktoken itself.

    tokenizer.json          the whole tokenizer: pattern, vocabulary, merges, control tokens
    vocab.json, merges.txt  the vocabulary and the merges again, for older programs
    tokenizer_config.json   what transformers adds: its class, the chat template, pad and end
    qwen.tiktoken           one base64 token and its rank per line; no control tokens
"""
import base64
import json
from pathlib import Path

import tiktoken

from lib.args import InputError, require
from lib.files import read_json, write_atomic

# Why a vocabulary file looks garbled: JSON holds text, but tokens are bytes, and many are not valid
# UTF-8 (a third of a Chinese character). GPT-2 writes each byte as one printable character. Bytes
# that print stand for themselves; the other 68 move to U+0100 and up. A space shows as Ġ (U+0120),
# a newline as Ċ, "世" (bytes E4 B8 96) as ä¸ĸ. The ids 0-255 are in this order.
_NO_PRINT = [b for b in range(256) if b <= 0x20 or 0x7F <= b <= 0xA0 or b == 0xAD]
_PRINT = [b for b in range(256) if b not in _NO_PRINT]
BYTE_ORDER = _PRINT + _NO_PRINT
_TO_PRINT = {b: b for b in _PRINT} | {b: 256 + i for i, b in enumerate(_NO_PRINT)}
_FROM_PRINT = {c: b for b, c in _TO_PRINT.items()}


def printable(token: bytes) -> str:
    """Return the spelling of vocab.json and merges.txt: b" caf\\xc3\\xa9" -> "ĠcafÃ©"."""
    return token.decode("latin-1").translate(_TO_PRINT)


def unprintable(text: str) -> bytes:
    """Return the bytes of such a spelling. KeyError for a character that spells no byte."""
    return bytes([_FROM_PRINT[ord(c)] for c in text])


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Turn token -> rank, all that a .tiktoken file has, into the merges that HF files need.

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


def tiktoken_encoding(tokens: dict[bytes, int], merges: list | None, pattern: str,
                      n_vocab: int) -> tiktoken.Encoding:
    """Return tiktoken's BPE. Its priority is the id, so merges in any other order are refused. A
    token that no merge makes keeps its id, but is never the result of encoding."""
    if merges is None:
        ranks = dict(tokens)
    else:
        ranks = {token: i for token, i in tokens.items() if len(token) == 1}
        last = -1
        for a, b in merges:
            made = tokens.get(a + b, -1)
            require(made > last, "the merges are not in the order of the ids they make")
            ranks[a + b] = made
            last = made
    # Some vocabularies lack bytes that clean text hardly has, and tiktoken would abort there. They
    # get ids from n_vocab on, which the tokenizer drops, as HF does.
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    for i, byte in enumerate(missing):
        ranks[byte] = n_vocab + i
    try:
        return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise InputError(f"pre-tokenizer pattern: {error}") from None


# ---------------------------------------------------------------------------------------------
# reading: each function returns arguments of tokenizer.Tokenizer

def read_ranks(path: Path) -> dict:
    """Read a .tiktoken file."""
    tokens = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        tokens[base64.b64decode(token, validate=True)] = int(rank)
    return {"tokens": tokens}


def read_tokenizer_json(path: Path, control_tokens: list[str]) -> dict:
    """Read tokenizer.json. InputError for steps that we do not have: a tokenizer that is nearly
    right would train a model on wrong ids without a word."""
    data = read_json(path)
    steps = data["pre_tokenizer"].get("pretokenizers", [])
    require([step["type"] for step in steps] == ["Split", "ByteLevel"]
            and not steps[0]["invert"] and steps[0]["behavior"] == "Isolated"
            and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]
            and data["normalizer"] in (None, {"type": "NFC"}),
            "only NFC, Split(regex, isolated), ByteLevel are known, as in Qwen2.5")
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    parts = from_spelling(vocab, merges, data["added_tokens"], control_tokens)
    parts["pattern"] = steps[0]["pattern"]["Regex"]
    parts["nfc"] = data["normalizer"] is not None
    return parts


def read_vocab_and_merges(directory: Path, control_tokens: list[str]) -> dict:
    """Read vocab.json and merges.txt, and the control tokens of tokenizer_config.json if any."""
    merges = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    if merges[:1] == ["#version: 0.2"]:
        merges = merges[1:]
    added = []
    config = directory / "tokenizer_config.json"
    if config.is_file():
        for i, token in read_json(config).get("added_tokens_decoder", {}).items():
            added.append({"id": int(i), **token})
    return from_spelling(read_json(directory / "vocab.json"), merges, added, control_tokens)


def from_spelling(vocab: dict[str, int], merges: list, added: list[dict],
                  control_tokens: list[str]) -> dict:
    """Turn printable spellings into bytes, and HF's added tokens into control tokens. Without
    added tokens, the names of control_tokens in the vocabulary are taken for it."""
    parts = {}
    if not added:
        added = [{"content": name, "id": vocab[name]} for name in control_tokens if name in vocab]
    if added:
        parts["special"] = {token["content"]: token["id"] for token in added}
        parts["hidden"] = {token["content"] for token in added if token.get("special", True)}
    # Some, such as SmolLM2, list the control tokens inside the vocabulary too.
    special = parts.get("special", ())
    parts["tokens"] = {unprintable(text): i for text, i in vocab.items() if text not in special}
    parts["merges"] = []
    for merge in merges:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        parts["merges"].append((unprintable(a), unprintable(b)))
    return parts


# ---------------------------------------------------------------------------------------------
# writing

# The layout of tokenizer.chat_segments in Jinja; a test renders with both.
CHAT_TEMPLATE = r"""{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% else %}{{- SYSTEM }}{% endif %}
{%- if tools %}{{- HEAD }}{% for tool in tools %}{{- '\n' }}{{- tool | tojson }}{% endfor %}
    {{- TAIL }}{% endif %}{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def chat_template(default_system: str, tools_head: str, tools_tail: str) -> str:
    """Return CHAT_TEMPLATE with its three texts. A Jinja string literal is written like JSON's."""
    template = CHAT_TEMPLATE
    for name, text in (("SYSTEM", default_system), ("HEAD", tools_head), ("TAIL", tools_tail)):
        template = template.replace(f" {name} ", f" {json.dumps(text)} ")
    return template


def write_files(tokenizer, directory: Path, tokenizer_class: str, template: str) -> None:
    """Write the four files of HF, each atomically."""
    merges = [f"{printable(a)} {printable(b)}" for a, b in tokenizer.merges]
    vocab = {printable(token): i for token, i in tokenizer.tokens.items()}
    # Control tokens below the last regular id must be in the vocabulary, or HF renumbers them.
    last = max(tokenizer.tokens.values())
    vocab |= {name: i for name, i in tokenizer.special.items() if i < last}
    added = {}
    for name, i in sorted(tokenizer.special.items(), key=lambda item: item[1]):
        added[i] = {"content": name, "lstrip": False, "normalized": False, "rstrip": False,
                    "single_word": False, "special": name in tokenizer.hidden}
    files = {"vocab.json": vocab,
             "tokenizer.json": tokenizer_json(tokenizer, vocab, merges, added),
             "tokenizer_config.json": tokenizer_config(tokenizer, added, tokenizer_class, template)}
    write_atomic(directory / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        write_atomic(directory / name, text + "\n")


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


def tokenizer_config(tokenizer, added: dict, tokenizer_class: str, template: str) -> dict:
    pad = added[tokenizer.pad_id]["content"]
    hidden = [name for name in tokenizer.special if name in tokenizer.hidden]
    return {
        "tokenizer_class": tokenizer_class,
        "added_tokens_decoder": added,
        "chat_template": template,
        "additional_special_tokens": [name for name in hidden if name != "<|endoftext|>"],
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": pad,
        "add_prefix_space": False,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
