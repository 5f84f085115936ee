"""Qwen2.5's tokenizer: byte-level BPE, trained here or loaded, and the ChatML renderer.

    python tokenizer.py                                             # a demonstration, seconds
    python tokenizer.py train --input a.txt b.txt --vocab_size 4096 --out runs/tokenizer
    python tokenizer.py show runs/tokenizer --text "Hello, 世界"     # or --chat chats.jsonl

Text becomes ids in five steps:
  1. Control tokens are split out, but only if the caller allows it (`encode`).
  2. Unicode NFC: "e" + combining accent and the one-character "é" give the same ids.
  3. A regular expression (lib/tokenizer_files.py) cuts the text into pre-tokens; no token crosses
     a cut. It is GPT-4's (cl100k_base), but digits stand alone: 2025 is 2|0|2|5.
  4. Pre-tokens become UTF-8 bytes. All 256 bytes are tokens, so nothing is ever unknown (bytes
     that a loaded vocabulary lacks are dropped, as in Hugging Face's tokenizers).
  5. BPE merges the adjacent pair that was learned earliest, until no learned pair is left.
tiktoken (Rust) does step 5; `train_bpe` learns the merges.

151,643 regular and 22 control tokens are 151,665 ids (`n_vocab`). `vocab_size` in a config.json
counts the rows of the embedding, 151,936 or 152,064. Never sample the rows from 151,665 on.
One difference from Qwen: our pad token is <|fim_pad|>, not <|endoftext|>. Where a pad that is also
a stop id is masked out of the loss, the model never learns to stop.
"""
import argparse
import heapq
import json
import math
import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import regex  # `re` has no \p{L}; tiktoken depends on it already

from data.conversations import to_conversation
from lib import chat, tokenizer_files
from lib.args import InputError, exit_on_input_error, require
from lib.chat import DEFAULT_SYSTEM
from lib.files import read_jsonl, read_texts
from lib.tokenizer_files import PATTERN

# In the order of their ids. Hugging Face (HF) hides only the first 14 in decoded text: tool calls
# and code-infilling marks are part of an answer.
CONTROL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>").split()
MAX_PRETOKEN = 256        # characters; training only. Qwen's longest token: 128 spaces
SPACE_RUN = 900_000       # tiktoken's regex engine aborts on about a million spaces in a row

TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
              '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def clean_text(text: str, nfc: bool = True) -> str:
    """Return the text that is really encoded. A lone surrogate (half a character, from broken JSON
    or UTF-16) has no UTF-8 form: a matching pair is joined, any other becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text) if nfc else text


# --- training -------------------------------------------------------------------------------------

def count_pretokens(texts, pattern: str = PATTERN) -> dict[bytes, int]:
    """Return how often each distinct pre-token occurs, which is all that BPE needs. Cutting long
    ones (base64, a file without a space) bounds the cost of a merge."""
    split = regex.compile(pattern).finditer  # findall would take 20 times the space of the text
    counts = Counter()
    for text in texts:
        counts.update(match[0] for match in split(clean_text(text)))
    words = Counter()
    for word, n in counts.items():
        for at in range(0, len(word), MAX_PRETOKEN):
            words[word[at:at + MAX_PRETOKEN].encode()] += n
    return words


class Corpus:
    """The distinct words of a text as lists of token ids, and where each adjacent pair occurs."""

    def __init__(self, word_counts: dict[bytes, int]):
        self.words = [list(word) for word in word_counts]     # here ids start as byte values
        self.frequencies = list(word_counts.values())
        self.pair_counts = defaultdict(int)   # pair -> occurrences in all text
        self.where = defaultdict(list)        # pair -> indices of words that may hold it
        for i, word in enumerate(self.words):
            for pair in zip(word, word[1:], strict=False):
                self.pair_counts[pair] += self.frequencies[i]
                self.where[pair].append(i)

    def merge(self, pair: tuple[int, int], new: int) -> set[tuple[int, int]]:
        """Replace `pair` by the token `new` everywhere. Return the pairs that this creates. A merge
        costs as much as its own occurrences, since only pairs beside them change their counts."""
        a, b = pair
        counts = self.pair_counts
        where = self.where
        created = set()
        for i in set(where.pop(pair)):
            word = self.words[i]
            n = self.frequencies[i]
            at = 0
            while at < len(word) - 1:                        # left to right, as encoding does
                if word[at] == a and word[at + 1] == b:
                    word[at:at + 2] = [new]
                    if at > 0:                               # x a b -> x new
                        x = word[at - 1]
                        counts[x, a] -= n
                        counts[x, new] += n
                        where[x, new].append(i)
                        created.add((x, new))
                    if at + 1 < len(word):                   # a b x -> new x
                        x = word[at + 1]
                        counts[b, x] -= n
                        counts[new, x] += n
                        where[new, x].append(i)
                        created.add((new, x))
                at += 1
        del counts[pair]
        return created


def tie_key(token: bytes) -> tuple[int, ...]:
    """Return a key that sorts the greater token first, because heapq pops the smallest entry."""
    complement = tuple(-byte for byte in token)
    return complement + (1,)  # an end above all others: "ab" precedes "a"


def train_bpe(word_counts: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn byte-pair encoding (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2). Repeat:
    the most frequent adjacent pair becomes a token and is replaced everywhere. Return the pairs in
    the order learned, fewer than n_merges if nothing is left to merge. Ties: the greater pair of
    byte strings wins, (b, a) before (a, z), so the order of documents does not matter.
    Worked example, aaabdaaabac: aa is seen at 4 places, merge (a, a) -> Z: ZabdZabac. Now Za and ab
    occur twice; (aa, a) > (a, b) as byte strings, so (aa, a) -> Y: YbdYbac; then (aaa, b)."""
    corpus = Corpus(word_counts)
    names = [bytes([b]) for b in range(256)]      # id -> bytes
    keys = [tie_key(name) for name in names]
    counts = corpus.pair_counts
    heap = [(-n, keys[a], keys[b], (a, b)) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        negative, key_a, key_b, pair = heapq.heappop(heap)
        if counts[pair] != -negative:  # stale: the count has fallen since this entry was pushed
            if counts[pair] > 0:       # push it again with its present count
                heapq.heappush(heap, (-counts[pair], key_a, key_b, pair))
            continue
        new = len(names)
        a, b = pair
        merges.append((names[a], names[b]))
        names.append(names[a] + names[b])
        keys.append(tie_key(names[new]))
        for x, y in corpus.merge(pair, new):
            if counts[x, y] > 0:  # in aaaa, (new, a) is created and eaten by the next replacement
                heapq.heappush(heap, (-counts[x, y], keys[x], keys[y], (x, y)))
    return merges


# --- conversations --------------------------------------------------------------------------------

class Segment(NamedTuple):
    """A piece of a rendered conversation."""
    text: str
    trained: bool = False    # the model must learn to say it: its loss mask is 1
    template: bool = False   # this file wrote it, so it may hold control tokens


def chat_segments(messages: list[dict], add_generation_prompt: bool, tools, layout):
    """Yield a conversation in ChatML as Segments, as the chat template of this layout writes it."""
    chat.check_messages(messages)
    tools = chat.parse_tools(tools)
    chat.check_layout(layout, messages, tools)
    if messages[0]["role"] != "system" and layout.default_system is not None:
        messages = [{"role": "system", "content": layout.default_system}, *messages]
    roles = [message["role"] for message in messages]
    roles.append("end")
    for i, message in enumerate(messages):
        if roles[i] == "assistant":
            yield from assistant_turn(message)
        elif roles[i] == "tool":     # the results of one round of calls share a user turn
            if roles[i - 1] != "tool":
                yield Segment("<|im_start|>user", template=True)
            yield Segment("\n<tool_response>\n", template=True)
            yield Segment(message["content"])
            yield Segment("\n</tool_response>", template=True)
            if roles[i + 1] != "tool":
                yield Segment("<|im_end|>\n", template=True)
        else:
            yield Segment(f"<|im_start|>{roles[i]}\n", template=True)
            yield Segment(message["content"])
            if i == 0 and tools:     # with tools, message 0 is the system prompt
                yield from tool_list(tools)
            yield Segment("<|im_end|>\n", template=True)
    if add_generation_prompt:
        yield Segment("<|im_start|>assistant\n", template=True)


def tool_list(tools: list[dict]):
    yield Segment(TOOLS_HEAD, template=True)
    for tool in tools:
        yield Segment("\n" + json.dumps(tool, ensure_ascii=False))
    yield Segment(TOOLS_TAIL, template=True)


def assistant_turn(message: dict):
    """Yield an answer with its tool calls. The answer, the calls and <|im_end|> are trained. The
    header is not, since generation is given it; nor the last newline: generation stops before."""
    content = message.get("content") or ""
    yield Segment("<|im_start|>assistant\n", template=True)
    yield Segment(content, trained=True)
    for n, call in enumerate(message.get("tool_calls") or []):
        function = chat.called_function(call)
        arguments = json.dumps(chat.called_arguments(function), ensure_ascii=False)
        newline = "\n" if content or n > 0 else ""
        yield Segment(newline + '<tool_call>\n{"name": "', trained=True, template=True)
        yield Segment(f'{function["name"]}", "arguments": {arguments}', trained=True)
        yield Segment("}\n</tool_call>", trained=True, template=True)
    yield Segment("<|im_end|>", trained=True, template=True)
    yield Segment("\n", template=True)


# --- the tokenizer --------------------------------------------------------------------------------

def any_of(names) -> re.Pattern | None:
    """Return a pattern for any of these texts, the longest that fits; None if there are none."""
    if not names:
        return None
    longest_first = sorted(names, key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first))
    return re.compile(f"({alternatives})")


def split_out(pattern: re.Pattern | None, text: str) -> list[str]:
    """Return the pieces of a text; every second one is what the pattern found."""
    return pattern.split(text) if pattern else [text]


class Tokenizer:
    """`n_vocab`: how many ids exist. `special`: token outside the merges -> id. `eos_id`
    <|endoftext|> ends a document, `im_end_id` a turn; either ends a generation (`stop_ids`).
    `pad_id` is neither, but build masks from lengths, never from `ids != pad_id`."""

    def __init__(self, tokens: dict[bytes, int], added: list[dict] | None = None,
                 merges: list = (), pattern: str = PATTERN, nfc: bool = True,
                 chat_template: str = chat.CHAT_TEMPLATE, files: dict[str, str] | None = None):
        """tokens: regular token -> id. added: Hugging Face's added tokens, {"content", "id"} and
        "special" (skip_special_tokens hides it) and "normalized" (it is looked for after NFC, not
        before, as words that users added may be); None: Qwen2.5's 22 control tokens follow. merges:
        pairs of tokens in the order of the ids that they make. files: texts that `save_pretrained`
        writes again."""
        if added is None:
            added = []
            for i, name in enumerate(CONTROL_TOKENS):
                added.append({"content": name, "id": len(tokens) + i, "special": i < 14})
        self.added = added
        self.special = {token["content"]: token["id"] for token in added}
        self.hidden = {token["content"] for token in added if token.get("special", True)}
        self.n_vocab = len(tokens) + len(self.special)
        self.tokens = tokens
        self.merges = merges
        self.pattern = pattern
        self.nfc = nfc
        self.files = files or {}
        self.chat_template = chat_template
        self._layout = chat.chat_layout(chat_template)

        self._bytes = {i: token for token, i in tokens.items()}
        self._bytes |= {i: name.encode() for name, i in self.special.items()}
        require(sorted(self._bytes) == list(range(self.n_vocab)),
                f"the {self.n_vocab} tokens do not have the ids 0..{self.n_vocab - 1}")
        for name in CONTROL_TOKENS[:3]:
            require(name in self.special, f"the vocabulary has no {name}")
        self.eos_id = self.special["<|endoftext|>"]
        self.im_start_id = self.special["<|im_start|>"]
        self.im_end_id = self.special["<|im_end|>"]
        self.stop_ids = (self.im_end_id, self.eos_id)
        # Added tokens that are not control tokens count in any text, allowed or not.
        control = self.special.keys() & (self.hidden | set(CONTROL_TOKENS))
        words = self.special.keys() - control
        self._control = any_of(control)
        self.pad_id = self.special.get("<|fim_pad|>")
        if self.pad_id is None:  # a vocabulary of another model: the highest that ends nothing
            ids = {self.special[name] for name in control}
            self.pad_id = max(ids - set(self.stop_ids))
        normalized = {token["content"] for token in added if token.get("normalized")}
        self._patterns = {}   # allow_special -> what `encode` looks for before NFC, and after it
        for allowed, names in ((False, words), (True, control | words)):
            before_nfc = any_of(names - normalized)
            after_nfc = any_of(names & normalized)
            self._patterns[allowed] = (before_nfc, after_nfc)
        self._bpe = tokenizer_files.tiktoken_encoding(tokens, merges, pattern, self.n_vocab)

    def padded_vocab_size(self, multiple: int = 128) -> int:
        """Return the number of embedding rows. Those from n_vocab on must never be sampled."""
        return math.ceil(self.n_vocab / multiple) * multiple

    @classmethod
    def train(cls, texts, vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary from an iterable of documents. vocab_size counts 256 bytes, merges and
        22 control tokens. A corpus with too little to merge gives fewer: read `n_vocab`."""
        least = 256 + len(CONTROL_TOKENS)
        require(vocab_size >= least, f"vocab_size {vocab_size}: must be at least {least}, for 256 "
                f"bytes and {len(CONTROL_TOKENS)} control tokens")
        require(not isinstance(texts, str), "texts must be several documents, not one string")
        counts = count_pretokens(texts)
        # Every conversation holds the template's words, but pre-training text hardly any of them.
        # So each counts as 0.1% of all words; else the default system prompt takes 37 tokens.
        per_mille = sum(counts.values()) // 1000
        if per_mille > 0:
            words = count_pretokens([DEFAULT_SYSTEM, "system", "user", "assistant"])
            for word, n in words.items():
                counts[word] += n * per_mille
        merges = train_bpe(counts, vocab_size - least)
        names = [bytes([b]) for b in tokenizer_files.BYTE_ORDER]
        names += [a + b for a, b in merges]
        tokens = {name: i for i, name in enumerate(names)}
        return cls(tokens, merges=merges)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read a directory with tokenizer.json, or with vocab.json and merges.txt, or a .tiktoken
        file. Control tokens as listed there, else Qwen's. InputError names the broken file."""
        path = Path(path)
        source = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else path
        try:
            if path.is_dir():
                return cls(**tokenizer_files.read_directory(path, CONTROL_TOKENS))
            return cls(**tokenizer_files.read_tiktoken(path))
        except InputError as error:
            where = "" if str(path) in str(error) else f"{source}: "
            raise InputError(f"{where}{error}") from None
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{source}: not a byte-level BPE tokenizer ({error!r})") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that transformers and vLLM read. Those that came with a loaded tokenizer
        are kept as they were: template, pad, model_max_length, ..."""
        tokenizer_files.write_files(self, Path(directory))

    def set_default_system(self, system: str) -> None:
        """Use this system prompt for chats without one, in Qwen2.5's chat template."""
        self.chat_template = chat.template_with(system)
        self._layout = chat.chat_layout(self.chat_template)
        self.files.pop("chat_template.jinja", None)
        if "tokenizer_config.json" in self.files:
            config = json.loads(self.files["tokenizer_config.json"])
            config["chat_template"] = self.chat_template
            self.files["tokenizer_config.json"] = tokenizer_files.to_json(config)

    def _encode_plain(self, text: str) -> list[int]:
        """Return the ids of clean text, in which control tokens are plain text."""
        spaces = re.finditer(r"\s+", text)  # r"\s{900000}" would take quadratic time
        if len(text) > SPACE_RUN and any(len(run[0]) >= SPACE_RUN for run in spaces):
            ids = []
            for piece in regex.findall(self.pattern, text):   # slower, but tiktoken would abort
                ids += self._bpe._encode_single_piece(piece)
        else:
            ids = self._bpe.encode_ordinary(text)
        if self._bpe.max_token_value >= self.n_vocab:  # stand-ins for bytes without a token
            ids = [i for i in ids if i < self.n_vocab]
        return ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text; decode(encode(s)) is NFC(s). By default <|im_end|> in the text
        is ordinary tokens: text from a user or a file must never end a turn. With allow_special
        it is the control token, which is only for text that this program wrote itself."""
        before_nfc, after_nfc = self._patterns[allow_special]
        ids = []
        for i, piece in enumerate(split_out(before_nfc, text)):
            if i % 2:
                ids.append(self.special[piece])
                continue
            clean = clean_text(piece, self.nfc)
            for j, part in enumerate(split_out(after_nfc, clean)):
                if j % 2:
                    ids.append(self.special[part])
                else:
                    ids += self._encode_plain(part)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode on all cores: tiktoken works outside Python's global lock."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, also of invalid UTF-8; decode_bytes gives them back."""
        ids = []
        for start in range(0, len(data), SPACE_RUN):  # tiktoken would abort on a longer run
            ids += self._bpe._encode_bytes(data[start:start + SPACE_RUN])
        return ids

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Return whether both give every token the same id."""
        return self.tokens == other.tokens and self.special == other.special

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes. Over a text their lengths add up to its UTF-8 length."""
        return self.decode_bytes([token_id])

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Join the tokens' bytes. InputError for an id that is no token, such as a padded row."""
        try:
            return b"".join([self._bytes[int(i)] for i in ids])  # a tensor's numbers too
        except KeyError as error:
            raise InputError(f"token id {error} is outside 0..{self.n_vocab - 1}") from None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; U+FFFD where they are no valid UTF-8 (an answer cut inside a
        character). skip_special_tokens hides turn marks and the pad, not <tool_call>, as in HF."""
        if skip_special_tokens:
            hidden = {self.special[name] for name in self.hidden}
            hidden.add(self.pad_id)
            ids = [i for i in map(int, ids) if i not in hidden]
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def render(self, messages: list[dict], add_generation_prompt: bool = False,
               tools: list | str | None = None) -> tuple[list[int], list[int]]:
        """Return (ids, mask) of a conversation; the project has no other renderer. The mask is 1 on
        what an assistant says and on its <|im_end|>, else 0. InputError names a bad message.
        The system prompt of a chat without one is that of the directory's chat template.

        Text between control tokens is encoded in one piece, across template and content, as HF
        does. Only an answer starts a new piece: generation starts from the ids of "assistant\\n",
        so training must see them too. (HF encodes both together: with an answer that starts with a
        newline, the header's "\\n" becomes one token.)"""
        pieces = []
        for segment in chat_segments(messages, add_generation_prompt, tools, self._layout):
            texts = [segment.text]
            if segment.template:
                texts = self._control.split(segment.text)  # every second one is a control token
            for i, text in enumerate(texts):
                pieces.append((text, segment.trained, i % 2 == 1))
        ids = []
        mask = []
        # Neighbours that agree in (trained, is_control) are joined, and encoded as one text.
        for (trained, is_control), run in groupby(pieces, key=itemgetter(1, 2)):
            text = "".join([piece[0] for piece in run])
            new = self.encode(text, allow_special=is_control)
            ids += new
            mask += [int(trained)] * len(new)
        return ids, mask

    def render_prompt(self, prompt: str | list[dict], tools=None) -> list[int]:
        """Return the ids of a question (text, or messages), ending in the assistant's header."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids, _ = self.render(messages, add_generation_prompt=True, tools=tools)
        return ids


# --- command line ---------------------------------------------------------------------------------

def show(tokenizer: Tokenizer, text: str) -> None:
    """Print each token of a text."""
    print(f"{'id':>7}  {'in vocab.json':<20} {'bytes':<30} text")
    for i in tokenizer.encode(text, allow_special=True):
        token = tokenizer.token_bytes(i)
        spelling = tokenizer_files.printable(token)
        numbers = token.hex(" ")
        readable = repr(token.decode("utf-8", "replace"))
        if "\ufffd" in readable:
            readable = "part of a character"
        print(f"{i:>7}  {spelling:<20} {numbers:<30} {readable}")


def show_chat(tokenizer: Tokenizer, messages: list[dict], tools: list | None) -> None:
    """Print what the model reads at each position, and what it is trained to say next."""
    ids, mask = tokenizer.render(messages, tools=tools)
    print(f"{'id':>7}  {'token':<24} is trained to predict (weight 1/{sum(mask)} each)")
    texts = [repr(tokenizer.decode([i])) for i in ids]
    for t in range(len(ids) - 1):
        target = texts[t + 1] if mask[t + 1] else ""
        print(f"{ids[t]:>7}  {texts[t]:<24} {target}")


def demo() -> None:
    """Train on Python's language reference, which is on every machine."""
    from pydoc_data.topics import topics
    start = time.perf_counter()
    tokenizer = Tokenizer.train(topics.values(), 2048)
    print(f"trained {tokenizer.n_vocab} tokens in {time.perf_counter() - start:.1f} s\n")
    show(tokenizer, "<|im_start|>user\nThe tokenizer's café, 世界 2025<|im_end|>")
    print("\nGarbled? vocab.json spells each byte as one printable character: Ġ is a space, Ċ a "
          "newline.\nThe bytes are what counts; a rare character takes several tokens.")


def training_texts(paths: list[Path]):
    """Yield the texts of files: of .jsonl and .json each row's "text", else their documents."""
    for path in paths:
        if not path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json")):
            yield from read_texts(path)
            continue
        for number, row in read_jsonl(path):
            require(isinstance(row.get("text"), str), f'{path}:{number}: must have a "text"')
            yield row["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("--input", nargs="+", required=True, type=Path,
                       help='UTF-8 text files, or .jsonl files with a "text" in each row')
    train.add_argument("--vocab_size", type=int, default=4096, help="all tokens, control included")
    train.add_argument("--out", required=True, type=Path, help="directory to write")
    shown = commands.add_parser("show", help="print the tokens of a text")
    shown.add_argument("path", help="directory or .tiktoken file")
    what = shown.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--chat", help="JSONL of conversations: the first one, with its loss mask")
    shown.add_argument("--system", help="system prompt of a chat without one, as for sft.py")
    args = parser.parse_args()
    if args.command is None:
        demo()
    elif args.command == "train":
        require(not (args.out / "tokenizer.json").exists(),
                f"{args.out} holds a tokenizer: pass another --out")
        tokenizer = Tokenizer.train(training_texts(args.input), args.vocab_size)
        tokenizer.save_pretrained(args.out)
        print(f"{args.out}: {tokenizer.n_vocab} tokens")
    else:
        tokenizer = Tokenizer.from_pretrained(args.path)
        if args.system:
            tokenizer.set_default_system(args.system)
        if args.text is not None:
            show(tokenizer, args.text)
            return
        _, first = next(read_jsonl(args.chat), (0, {}))
        messages, tools = to_conversation(first)
        show_chat(tokenizer, messages, tools)


if __name__ == "__main__":
    exit_on_input_error(main)
