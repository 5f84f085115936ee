"""Qwen2.5's tokenizer: byte-level BPE, trained here or loaded, and the ChatML renderer.

    python tokenizer.py                                             # a demonstration, seconds
    python tokenizer.py train --input a.txt b.txt --vocab_size 4096 --out runs/tokenizer
    python tokenizer.py show runs/tokenizer --text "Hello, 世界"     # or a qwen.tiktoken file

Text becomes ids in five steps:
  1. control tokens are split out, only if the caller allows it (`encode`);
  2. Unicode NFC: "e" + combining accent and the one-character "é" give the same ids;
  3. a regular expression cuts pre-tokens; no token crosses a cut. It is GPT-4's (cl100k_base) with
     one change: digits stand alone, 2025 is 2|0|2|5;
  4. UTF-8 bytes: with 256 byte tokens as the floor, nothing is ever unknown;
  5. BPE: merge the adjacent pair that was learned earliest, until none is left.
Step 5 runs in tiktoken (Rust). Training (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2)
is `train_bpe`, here.

Five numbers that people confuse:
  151,643  regular tokens: 256 bytes + 151,387 merges;
  151,646  with Qwen2's control tokens <|endoftext|> <|im_start|> <|im_end|>;
  151,665  with all 22 control tokens of Qwen2.5: the ids that exist, `n_vocab`;
  151,936  rows of the embedding up to 3B = 128 * 1187, a size that divides well over GPUs. Rows
           past 151,664 are no token: never sample them;
  152,064  rows from 7B up = 128 * 1188. `vocab_size` in a config.json is such a number of rows.

Differs from Qwen: pad is <|fim_pad|>, not <|endoftext|>. A pad that is also a stop id gets masked
out of the loss, and the model never learns to stop.
"""
import argparse
import base64
import heapq
import json
import math
import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import regex  # `re` has no \p{L}; tiktoken depends on it already
import tiktoken

from lib.args import InputError, exit_on_input_error
from lib.files import read_json, read_jsonl, write_atomic

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# In id order. Hugging Face (HF) flags the first 14 `special`: skip_special_tokens hides those. Tool
# calls and code-infilling marks are part of an answer.
CONTROL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>").split()
MAX_PRETOKEN = 256        # characters; training only. Longest token of Qwen: 128 (spaces)
SPACE_RUN = 900_000       # tiktoken's regex engine aborts on about a million spaces in a row

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
              '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
# The same layout as `Tokenizer._segments`, for vLLM and transformers; a test renders with both.
# A Jinja string literal is written like a JSON one, hence json.dumps.
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
for _name, _text in (" SYSTEM ", DEFAULT_SYSTEM), (" HEAD ", TOOLS_HEAD), (" TAIL ", TOOLS_TAIL):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, f" {json.dumps(_text)} ")

# Why a vocabulary file looks garbled. JSON holds text, tokens are bytes, many not valid UTF-8 (a
# third of a Chinese character). GPT-2 wrote each byte as one printable character: those that print
# stand for themselves, the other 68 move to U+0100 and up. A space shows as Ġ (U+0120), a newline
# as Ċ, "世" (bytes E4 B8 96) as ä¸ĸ: a spelling, nothing is broken. Ids 0-255 have this order.
_PRINT = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = _PRINT + [b for b in range(256) if b not in _PRINT]
_TO_PRINT = {b: b if i < 188 else 256 + i - 188 for i, b in enumerate(BYTE_ORDER)}
_FROM_PRINT = {c: b for b, c in _TO_PRINT.items()}


def printable(token: bytes) -> str:
    """b" caf\\xc3\\xa9" -> "ĠcafÃ©", the spelling of vocab.json and merges.txt."""
    return token.decode("latin-1").translate(_TO_PRINT)


def unprintable(text: str) -> bytes:
    """The inverse. KeyError for a character that spells no byte."""
    return bytes([_FROM_PRINT[ord(c)] for c in text])


def clean_text(text: str, nfc: bool = True) -> str:
    """What is really encoded. A lone surrogate (half a character, from broken JSON or UTF-16) has
    no UTF-8 form: a matching pair is joined, any other becomes U+FFFD. Never an error."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text) if nfc else text


def count_pretokens(texts, pattern: str = PATTERN) -> dict[bytes, int]:
    """Documents -> how often each distinct pre-token occurs, which is all that BPE needs: 80,000 in
    4 MB. Cut at MAX_PRETOKEN characters (base64, a file without a space): bounds a merge's cost."""
    split, counts, words = regex.compile(pattern).findall, Counter(), Counter()
    for text in texts:
        counts.update(split(clean_text(text)))
    for word, n in counts.items():
        for at in range(0, len(word), MAX_PRETOKEN):
            words[word[at:at + MAX_PRETOKEN].encode()] += n
    return words


def train_bpe(word_counts: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding. Repeat: take the most frequent adjacent pair, make it a token, replace it
    everywhere. Returns the pairs in the order learned; fewer if nothing is left to merge. Ties: the
    greater pair of byte strings wins, (b, a) before (a, z), whatever the order of documents.

    Worked example, aaabdaaabac: aa occurs 4 times, merge (a, a) -> Z: ZabdZabac. Now Za and ab
    occur twice; (aa, a) > (a, b) as byte strings, so (aa, a) -> Y: YbdYbac; then (aaa, b).

    The naive loop recounts all text for each merge. Here a merge costs only its own occurrences:
    `where` tells which words hold a pair (possibly stale: the word is searched anyway), and counts
    of neighbouring pairs are corrected in place. Python integers do not overflow."""
    # heapq pops the smallest, but ties go to the greatest: complement each byte, and end with a
    # character above all others, since "ab" > "a" must turn into "ab" before "a".
    def sort_key(name: bytes) -> str:
        return name.translate(bytes(range(255, -1, -1))).decode("latin-1") + "\u0100"

    names = [bytes([b]) for b in range(256)]      # id -> bytes; here ids start as byte values
    keys = [sort_key(name) for name in names]
    words, freqs = [list(word) for word in word_counts], list(word_counts.values())
    counts, where = defaultdict(int), defaultdict(list)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += freqs[i]
            where[pair].append(i)
    heap = [(-n, keys[a], keys[b], (a, b)) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        n, key_a, key_b, pair = heapq.heappop(heap)
        if counts[pair] != -n:    # lazy heap: counts of old pairs only fall, so a stale entry is
            if counts[pair] > 0:  # too high and comes up early; put it back where it belongs
                heapq.heappush(heap, (-counts[pair], key_a, key_b, pair))
            continue
        (a, b), new, born = pair, len(names), set()
        merges.append((names[a], names[b]))
        names.append(names[a] + names[b])
        keys.append(sort_key(names[new]))
        for i in set(where.pop(pair)):
            word, n, at = words[i], freqs[i], 0
            while True:
                try:              # list.index searches at C speed; left to right, as encoding does
                    at = word.index(a, at, len(word) - 1)
                except ValueError:
                    break
                if word[at + 1] == b:
                    word[at:at + 2] = [new]
                    if at > 0:                               # x a b -> x new
                        x = word[at - 1]
                        counts[x, a] -= n
                        counts[x, new] += n
                        where[x, new].append(i)
                        born.add((x, new))
                    if at + 1 < len(word):                   # a b x -> new x
                        x = word[at + 1]
                        counts[b, x] -= n
                        counts[new, x] += n
                        where[new, x].append(i)
                        born.add((new, x))
                at += 1
        del counts[pair]
        for a, b in born:
            if counts[a, b] > 0:  # in aaaa, (new, a) is born and eaten by the next replacement
                heapq.heappush(heap, (-counts[a, b], keys[a], keys[b], (a, b)))
    return merges


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Token -> rank, which is all a .tiktoken file has, to the merges that HF files want: BPE on a
    token's own bytes, with the ranks below its own, must end in two parts. (tiktoken merges any
    neighbours that together are a token, HF only listed pairs. They agree on every text: the steps
    inside a token are the same whatever stands around it.) InputError if one cannot be reached."""
    merges = []
    for token, limit in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i)
                          for i in range(len(parts) - 1))
            if rank >= limit:
                raise InputError(f"token {limit} ({token!r}) cannot be built by merges")
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


class Tokenizer:
    """`special`: control token -> id. `eos_id` <|endoftext|> ends a document, `im_end_id` a turn,
    either a generation: `stop_ids`. `pad_id` is none of them, but build masks from lengths, never
    from `ids != pad_id`. `n_vocab`: all ids that exist."""

    def __init__(self, tokens: dict[bytes, int], special: dict[str, int] | None = None,
                 merges: list | None = None, pattern: str = PATTERN, nfc: bool = True,
                 hidden=frozenset(CONTROL_TOKENS[:14])):
        """tokens: regular token -> id. special None: Qwen2.5's 22, after those. merges None: any
        token of 2+ bytes is reachable, by rank. InputError if the parts make no tokenizer."""
        if special is None:
            special = {name: len(tokens) + i for i, name in enumerate(CONTROL_TOKENS)}
        self._tokens, self._merges, self.special = tokens, merges, special
        self._pattern, self._nfc, self._hidden = pattern, nfc, hidden
        self.n_vocab, ranks = len(tokens) + len(special), tokens
        everything = [*tokens.items(), *((name.encode(), i) for name, i in special.items())]
        self._bytes = [token for token, _ in sorted(everything, key=lambda item: item[1])]
        if sorted(i for _, i in everything) != list(range(self.n_vocab)):
            raise InputError(f"the {self.n_vocab} tokens do not have the ids 0..{self.n_vocab - 1}")
        if missing := [name for name in CONTROL_TOKENS[:3] if name not in special]:
            raise InputError(f"the vocabulary has no {missing[0]}")
        if merges is not None:
            # tiktoken's priority is the id; an HF file could order its merges otherwise. A token
            # that no merge makes keeps its id, but encode can never give it.
            made = [tokens.get(a + b, -1) for a, b in merges]
            if any(i >= j for i, j in zip([-1, *made], made, strict=False)):
                raise InputError("the merges are not in the order of the ids they make")
            ranks = {t: i for t, i in tokens.items() if len(t) == 1}
            ranks.update((self._bytes[i], i) for i in made)
        # Some vocabularies lack bytes that clean text hardly has. tiktoken would abort there: give
        # them ids past the end, for `_ordinary` to drop, as HF does.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self._lossy = bool(missing)
        ranks = ranks | {b: self.n_vocab + i for i, b in enumerate(missing)}
        try:
            self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})
        except ValueError as error:
            raise InputError(f"pre-tokenizer pattern: {error}") from None
        names = sorted(special, key=len, reverse=True)        # the longest match wins
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.eos_id, self.im_start_id, self.im_end_id = (special[t] for t in CONTROL_TOKENS[:3])
        self.stop_ids = (self.im_end_id, self.eos_id)
        self.pad_id = special.get("<|fim_pad|>", max({*special.values()} - {*self.stop_ids}))

    def padded_vocab_size(self, multiple: int = 128) -> int:
        """Embedding rows. Rows from n_vocab on belong to no token: mask them when sampling."""
        return -(-self.n_vocab // multiple) * multiple

    @classmethod
    def train(cls, texts, vocab_size: int) -> "Tokenizer":
        """Learn from an iterable of documents. vocab_size counts everything: 256 bytes, merges, 22
        control tokens. A corpus with too little to merge gives fewer: read `n_vocab`."""
        n_merges = vocab_size - 256 - len(CONTROL_TOKENS)
        if n_merges < 0:
            raise InputError(f"vocab_size {vocab_size}: at least {vocab_size - n_merges}, for 256 "
                             f"bytes and {len(CONTROL_TOKENS)} control tokens")
        if isinstance(texts, str):
            raise InputError("texts: want an iterable of documents, got one string")
        counts = count_pretokens(texts)
        # Every conversation holds the template's own words, and pre-training text hardly any of
        # them: each counts as one word in a thousand, or the default system prompt takes 37 tokens.
        if each := sum(counts.values()) // 1000:
            for word, n in count_pretokens([DEFAULT_SYSTEM, "system", "user", "assistant"]).items():
                counts[word] = counts.get(word, 0) + n * each
        merges = train_bpe(counts, n_merges)
        tokens = [bytes([b]) for b in BYTE_ORDER] + [a + b for a, b in merges]
        return cls({token: i for i, token in enumerate(tokens)}, merges=merges)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """A directory with tokenizer.json, or with vocab.json and merges.txt; or a .tiktoken file.
        Control tokens as listed there, else Qwen's. InputError names a missing or broken file."""
        source = path = Path(path)
        try:
            if not path.is_dir():
                lines = map(bytes.split, path.read_bytes().splitlines())
                return cls({base64.b64decode(token, validate=True): int(rank)
                            for token, rank in lines})
            fields = {}
            if (source := path / "tokenizer.json").is_file():
                data = read_json(source)
                vocab, merges = data["model"]["vocab"], data["model"]["merges"]
                fields["pattern"], fields["nfc"] = _pipeline(data)
                added = data["added_tokens"]
            else:
                source = path / "merges.txt"
                merges = source.read_text(encoding="utf-8").splitlines()
                merges = merges[merges[:1] == ["#version: 0.2"]:]
                vocab = read_json(source := path / "vocab.json")
                config = path / "tokenizer_config.json"
                flags = read_json(config) if config.is_file() else {}
                flags = flags.get("added_tokens_decoder", {})
                added = [{"id": int(i), **token} for i, token in flags.items()]
            added = added or [{"content": t, "id": vocab[t]} for t in CONTROL_TOKENS if t in vocab]
            if added:
                fields["special"] = {token["content"]: token["id"] for token in added}
                fields["hidden"] = {t["content"] for t in added if t.get("special", True)}
            # some, as SmolLM2, list the control tokens inside the vocabulary too
            tokens = {unprintable(token): i for token, i in vocab.items()
                      if token not in fields.get("special", ())}
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            fields["merges"] = [(unprintable(a), unprintable(b)) for a, b in pairs]
            return cls(tokens, **fields)
        except InputError as error:
            where = "" if str(path) in str(error) else f"{source}: "
            raise InputError(f"{where}{error}") from None
        except OSError as error:
            raise InputError(f"{source}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: not a byte-level BPE tokenizer ({error!r})") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """The Hugging Face files, each written atomically; transformers and vLLM read them."""
        if self._merges is None:
            self._merges = merges_from_ranks(self._tokens)
        # Control tokens below the last regular id must be in the vocabulary, or HF renumbers them.
        last = max(self._tokens.values())
        vocab = {printable(token): i for token, i in self._tokens.items()}
        vocab |= {t: i for t, i in self.special.items() if i < last}
        merges = [f"{printable(a)} {printable(b)}" for a, b in self._merges]
        added = {i: {"content": name, "lstrip": False, "normalized": False, "rstrip": False,
                     "single_word": False, "special": name in self._hidden}
                 for name, i in sorted(self.special.items(), key=lambda item: item[1])}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                      "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self._pattern}, "behavior": "Isolated",
                 "invert": False}
        is_qwen = self._pattern == PATTERN and self._nfc
        files = {"vocab.json": vocab, "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, **token} for i, token in added.items()],
            "normalizer": {"type": "NFC"} if self._nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                      "byte_fallback": False, "vocab": vocab, "merges": merges},
        }, "tokenizer_config.json": {
            # transformers' Qwen2Tokenizer builds Qwen's pipeline whatever tokenizer.json says
            "tokenizer_class": "Qwen2Tokenizer" if is_qwen else "PreTrainedTokenizerFast",
            "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": [t for t in self.special
                                          if t in self._hidden and t != "<|endoftext|>"],
            "bos_token": None, "unk_token": None, "eos_token": "<|im_end|>",
            "pad_token": self._bytes[self.pad_id].decode(), "add_prefix_space": False,
            "errors": "replace", "clean_up_tokenization_spaces": False, "model_max_length": 131072}}
        out = Path(directory)
        write_atomic(out / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
        for name, content in files.items():
            write_atomic(out / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    def _ordinary(self, text: str) -> list[int]:
        """Clean text -> ids; control tokens are plain text here."""
        if len(text) > SPACE_RUN and re.search(r"\s{%d}" % SPACE_RUN, text):
            pieces = regex.findall(self._pattern, text)        # slower, but tiktoken would abort
            ids = [i for piece in pieces for i in self._bpe._encode_single_piece(piece)]
        else:
            ids = self._bpe.encode_ordinary(text)
        return [i for i in ids if i < self.n_vocab] if self._lossy else ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text -> ids, such that decode(encode(s)) is NFC(s). By default <|im_end|> in the text is
        six ordinary tokens: text from a user or a file must never end a turn. With allow_special it
        is the control token; only for text that this program wrote itself."""
        if not allow_special:
            return self._ordinary(clean_text(text, self._nfc))
        ids = []
        for piece in filter(None, self._control.split(text)):    # split first, then NFC, as HF does
            ids += [self.special[piece]] if piece in self.special else self.encode(piece)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores: tiktoken works outside Python's global lock."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, also of invalid UTF-8; decode_bytes gives them back."""
        return self._bpe._encode_bytes(data)

    def token_bytes(self, token_id: int) -> bytes:
        """For bits per byte: over a text the lengths add up to its UTF-8 length."""
        return self.decode_bytes([token_id])

    def decode_bytes(self, ids: list[int]) -> bytes:
        """InputError for an id that is no token, as -100 (the ignore label) or a padded row."""
        if bad := [i for i in ids if not 0 <= i < self.n_vocab]:
            raise InputError(f"token id {bad[0]} is outside 0..{self.n_vocab - 1}")
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text; U+FFFD where they are no valid UTF-8 (an answer cut inside a character).
        skip_special_tokens hides turn marks and the pad but keeps <tool_call>, as HF does."""
        hidden = {self.special[name] for name in self._hidden & self.special.keys()} | {self.pad_id}
        ids = [i for i in ids if i not in hidden] if skip_special_tokens else ids
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _segments(self, messages: list[dict], add_generation_prompt: bool, tools: list | None):
        """Qwen2.5's ChatML as (text, trained, template) triples: `trained` text is what the model
        must learn to say; only `template` text, which is ours, may hold control tokens."""
        if not isinstance(messages, list) or not messages:
            raise InputError("messages: want a list with at least one message")
        for i, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ("system", "user", "assistant", "tool"):
                raise InputError(f"messages[{i}]: role must be system, user, assistant or tool, "
                                 f"got {role!r}")
            content = message.get("content")
            if not isinstance(content, str) and not (
                    content is None and role == "assistant" and message.get("tool_calls")):
                raise InputError(f"messages[{i}]: content must be a string, "
                                 f"got {type(content).__name__}")
        has_system = messages[0]["role"] == "system"
        yield "<|im_start|>system\n", False, True
        yield messages[0]["content"] if has_system else DEFAULT_SYSTEM, False, False
        if tools:
            yield TOOLS_HEAD, False, True
            for tool in tools:
                yield "\n" + json.dumps(tool, ensure_ascii=False), False, False
            yield TOOLS_TAIL, False, True
        yield "<|im_end|>\n", False, True
        roles = [message["role"] for message in messages] + [None]
        for i, message in enumerate(messages[has_system:], int(has_system)):
            content, trained = message.get("content") or "", roles[i] == "assistant"
            if roles[i] == "tool":        # the results of one round of calls share a user turn
                yield "\n<tool_response>\n" if i and roles[i - 1] == "tool" else (
                    "<|im_start|>user\n<tool_response>\n"), False, True
                yield content, False, False
                yield "\n</tool_response>" + "<|im_end|>\n" * (roles[i + 1] != "tool"), False, True
                continue
            if not isinstance(message.get("tool_calls") or [], list):
                raise InputError(f"messages[{i}]: tool_calls: want a list")
            yield f"<|im_start|>{roles[i]}\n", False, True
            yield content, trained, False
            for n, call in enumerate(message.get("tool_calls") or [] if trained else []):
                call = call.get("function", call) if isinstance(call, dict) else call
                if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
                    raise InputError(f"messages[{i}]: tool_calls[{n}]: want a name and arguments")
                yield ("\n" if content or n else "") + '<tool_call>\n{"name": "', True, True
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                yield f'{call["name"]}", "arguments": {arguments}', True, False
                yield "}\n</tool_call>", True, True
            yield "<|im_end|>", trained, True
            yield "\n", False, True
        if add_generation_prompt:
            yield "<|im_start|>assistant\n", False, True

    def render_text(self, messages, add_generation_prompt: bool = False, tools=None) -> str:
        """The conversation as Qwen2.5's own template writes it. To show, never to encode: in this
        string a forged <|im_end|> cannot be told from a real one."""
        return "".join(s[0] for s in self._segments(messages, add_generation_prompt, tools))

    def render(self, messages: list[dict], add_generation_prompt: bool = False,
               tools: list | None = None) -> tuple[list[int], list[int]]:
        """Messages -> (ids, mask), the only renderer of the project. mask is 1 on what an assistant
        says with its <|im_end|>, 0 elsewhere, also on the newline after it. InputError names a bad
        message. Text between control tokens is encoded in one piece, across template and content,
        as HF does. Not before an answer: generation starts from the ids of "assistant\\n", so
        training must see these. (HF differs if its first line is blank: "\\n\\n" is one token.)"""
        ids, mask, pending, flag = [], [], "", False
        for text, trained, template in [*self._segments(messages, add_generation_prompt, tools),
                                        ("", None, False)]:              # the end: flush
            for piece in self._control.split(text) if template else [text]:
                control = template and piece in self.special
                if control or trained != flag:
                    new = self.encode(pending)
                    ids, mask, pending, flag = ids + new, mask + [int(flag)] * len(new), "", trained
                if control:
                    ids.append(self.special[piece])
                    mask.append(int(trained))
                else:
                    pending += piece
        return ids, mask

    def render_prompt(self, prompt: str | list[dict]) -> list[int]:
        """Return the ids of a question (text, or messages), ending in the assistant's header."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.render(messages, add_generation_prompt=True)[0]


def _pipeline(data: dict) -> tuple[str, bool]:
    """tokenizer.json -> (pattern, NFC or not). InputError for steps we do not have: a tokenizer
    that is nearly right would train a model on wrong ids without a word."""
    steps = data["pre_tokenizer"].get("pretokenizers", [])
    if ([step["type"] for step in steps] != ["Split", "ByteLevel"] or steps[0]["invert"]
            or steps[0]["behavior"] != "Isolated" or steps[1]["use_regex"]
            or steps[1]["add_prefix_space"] or data["normalizer"] not in (None, {"type": "NFC"})):
        raise InputError("only NFC, Split(regex, isolated), ByteLevel are known, as in Qwen2.5")
    return steps[0]["pattern"]["Regex"], data["normalizer"] is not None


def show(tokenizer: Tokenizer, text: str) -> None:
    print(f"{'id':>7}  {'in vocab.json':<20} {'bytes':<30} text")
    for i in tokenizer.encode(text, allow_special=True):
        token = tokenizer.token_bytes(i)
        readable = repr(token.decode("utf-8", "replace"))
        print(f"{i:>7}  {printable(token):<20} {token.hex(' '):<30} "
              + ("part of a character" if "\ufffd" in readable else readable))


def show_chat(tokenizer: Tokenizer, messages: list[dict], tools: list | None = None) -> None:
    """What the model reads at each position, and what it is trained to say next (R8.2)."""
    ids, mask = tokenizer.render(messages, tools=tools)
    print(f"{'id':>7}  {'token':<24} is trained to predict (weight 1/{sum(mask)} each)")
    for i, after, trained in zip(ids, ids[1:], mask[1:], strict=False):
        target = repr(tokenizer.decode([after])) if trained else ""
        print(f"{i:>7}  {tokenizer.decode([i])!r:<24} {target}")


def demo() -> None:
    from pydoc_data.topics import topics  # Python's language reference: on every machine
    start, documents = time.perf_counter(), topics.values()
    tokenizer = Tokenizer.train(documents, 2048)
    print(f"trained {tokenizer.n_vocab} tokens on {sum(map(len, documents)):,} characters of "
          f"Python's documentation in {time.perf_counter() - start:.1f} s\n")
    show(tokenizer, "<|im_start|>user\nThe tokenizer's café, 世界 2025<|im_end|>")
    print("\nGarbled? vocab.json spells each byte as one printable character: Ġ is a space, Ċ a "
          "newline.\nThe bytes are what counts; a rare character takes several tokens.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("--input", nargs="+", required=True, type=Path, help="UTF-8 text files")
    train.add_argument("--vocab_size", type=int, default=4096, help="all tokens, control included")
    train.add_argument("--out", required=True, type=Path, help="directory to write")
    train.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --out")
    shown = commands.add_parser("show", help="print the tokens of a text")
    shown.add_argument("path", help="directory or .tiktoken file")
    what = shown.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--chat", help="JSONL of conversations: the first one, with its loss mask")
    args = parser.parse_args()
    if args.command == "show":
        tokenizer = Tokenizer.from_pretrained(args.path)
        if args.text is not None:
            return show(tokenizer, args.text)
        for _, row in islice(read_jsonl(args.chat), 1):
            show_chat(tokenizer, row.get("messages"), row.get("tools"))
        return None
    if args.command is None:
        return demo()
    if (args.out / "tokenizer.json").exists() and not args.overwrite:
        raise InputError(f"{args.out} holds a tokenizer: pass --overwrite or another --out")
    texts = []
    for path in args.input:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--input {path}: {error}") from None
    tokenizer = Tokenizer.train(texts, args.vocab_size)
    tokenizer.save_pretrained(args.out)
    used = sum(map(len, tokenizer.encode_batch(texts)))
    size = sum(len(text.encode()) for text in texts)
    print(f"{args.out}: {tokenizer.n_vocab} tokens, {size / max(used, 1):.2f} bytes per token")


if __name__ == "__main__":
    exit_on_input_error(main)
