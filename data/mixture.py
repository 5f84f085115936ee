"""From documents to training rows: token ids, a mixture of sources, packed rows.

The report samples some domains down (e-commerce, social media, entertainment) and others up
(technology, science, academic work); its ratios are not disclosed (section 3.1). Here a weight is a
share of *tokens*: by documents, a source of long ones would take far more.

    sources = {"web": tokenize(web_texts, tokenizer), "code": tokenize(code_texts, tokenizer)}
    rows, report = pack(sources, {"web": 0.7, "code": 0.3}, 1_000_000, seq_len=128, seed=0)
    ids, segment_ids = rows[[3, 8]]  # two rows of 129 tokens each
"""
import hashlib
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from data.documents import read_all
from lib.args import InputError, parse_value, require
from lib.files import atomic_path
from tokenizer import Tokenizer


def is_held_out(text: str) -> bool:
    """Return whether a document is held out, to measure the loss: one in fifty is, by its hash, so
    that it is the same ones whatever the order, the mixture or the seed."""
    content = text.encode("utf-8", "replace")
    digest = hashlib.blake2b(content, digest_size=4).digest()
    number = int.from_bytes(digest, "big")
    return number % 50 == 0


# ---------------------------------------------------------------------------------------------
# token ids

@dataclass
class Tokens:
    """Tokenized documents: one long array of ids, in memory or memory-mapped, and the places where
    each document starts and ends. Documents may overlap or leave gaps."""
    ids: np.ndarray     # (tokens,) uint16 or uint32
    starts: np.ndarray  # (documents,) int64
    ends: np.ndarray    # (documents,) int64

    @property
    def sizes(self) -> np.ndarray:
        return self.ends - self.starts

    def long_pieces(self, length: int) -> "Tokens":
        """Cut the documents into pieces of exactly `length`, and leave out their rests."""
        long = self.sizes >= length
        starts = [self.starts[:0]]
        for start, end in zip(self.starts[long], self.ends[long], strict=True):
            starts.append(np.arange(start, end - length + 1, length))
        starts = np.concatenate(starts)
        return Tokens(self.ids, starts, starts + length)

    def short_documents(self, length: int) -> "Tokens":
        """Select the documents with fewer than `length` tokens."""
        short = self.sizes < length
        return Tokens(self.ids, self.starts[short], self.ends[short])

    def split_end(self, share: float) -> tuple["Tokens", "Tokens"]:
        """Return the documents without the last `share` of their tokens, and these tokens. There
        must be no gaps between documents. One that lies across the cut is divided."""
        cut = int(len(self.ids) * (1 - share))
        starts_before = self.starts < cut
        ends_after = self.ends > cut
        ends = self.ends[starts_before].clip(max=cut)
        starts = self.starts[ends_after].clip(min=cut)
        before = Tokens(self.ids, self.starts[starts_before], ends)
        after = Tokens(self.ids, starts, self.ends[ends_after])
        return before, after


def id_type(tokenizer):
    """Return the smallest type that holds every id: int64 takes two to four times the space."""
    return np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32


def encode_documents(texts, tokenizer):
    """Yield the ids of each text, with <|endoftext|> at its end, as in Qwen's pre-training."""
    texts = iter(texts)
    while batch := list(islice(texts, 100)):
        for ids in tokenizer.encode_batch(batch):
            ids.append(tokenizer.eos_id)
            yield np.array(ids, id_type(tokenizer))


def tokenize(texts, tokenizer) -> Tokens:
    """Tokenize texts in memory."""
    documents = [np.empty(0, id_type(tokenizer))]
    documents.extend(encode_documents(texts, tokenizer))
    ids = np.concatenate(documents)
    sizes = [len(document) for document in documents]
    bounds = np.cumsum(sizes)
    return Tokens(ids, bounds[:-1], bounds[1:])


def write_tokens(stem: Path, texts, tokenizer) -> None:
    """Write {stem}.bin (ids) and {stem}.ends (where documents end, int64) for `read_tokens`."""
    size = 0
    with atomic_path(f"{stem}.bin") as ids_path, atomic_path(f"{stem}.ends") as ends_path:
        with open(ids_path, "wb") as ids_file, open(ends_path, "wb") as ends_file:
            for ids in encode_documents(texts, tokenizer):
                size += len(ids)
                ids_file.write(ids)
                ends_file.write(np.int64(size))


def read_tokens(stem: Path, tokenizer) -> Tokens:
    """Map the files of `write_tokens` into memory. Raises InputError if they do not match."""
    path = Path(f"{stem}.bin")
    ids = np.empty(0, id_type(tokenizer))
    try:
        if path.stat().st_size > 0:  # an empty file cannot be mapped
            ids = np.memmap(path, id_type(tokenizer), "r")
        bounds = np.append(0, np.fromfile(f"{stem}.ends", np.int64))
        require(len(ids) == bounds[-1], "they have different lengths")
    except (OSError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{stem}.bin and {stem}.ends are not of one piece ({error}): run "
                         "python -m data again") from None
    return Tokens(ids, bounds[:-1], bounds[1:])


# ---------------------------------------------------------------------------------------------
# training and held-out documents

def read_token_files(path: Path, expected: Tokenizer | None):
    """Map the token files of a directory, which must be of the expected tokenizer. Return training
    and held-out documents, {source: Tokens} each, and the tokenizer."""
    require((path / "report.json").exists(),
            f"--data {path}: python -m data has not finished there (no report.json)")
    tokenizer = Tokenizer.from_pretrained(path)
    require(expected is None or expected.has_ids_of(tokenizer),
            f"--data {path} holds tokens of another tokenizer than --tokenizer or --init")
    train, held_out = {}, {}
    for file in sorted(path.glob("*.train.bin")):
        name = file.name.removesuffix(".train.bin")
        train[name] = read_tokens(path / f"{name}.train", tokenizer)
        held_out[name] = read_tokens(path / f"{name}.held_out", tokenizer)
    return train, held_out, tokenizer


def tokenize_documents(paths: str, tokenizer: Tokenizer | None, vocab_size: int):
    """Read documents, train a tokenizer on them unless one is given, and encode them. Return as
    `read_token_files` does."""
    train, held_out = {}, {}
    for document in read_all(paths):
        source, text = document["source"], document["text"]
        train.setdefault(source, [])  # the sources keep the order of their first documents
        held_out.setdefault(source, [])
        part = held_out if is_held_out(text) else train
        part[source].append(text)
    usable = train if any(train.values()) else held_out  # of few documents, all may be held out
    require(any(usable.values()), "--data has no document to train on")
    if tokenizer is None:
        every_text = (text for texts in usable.values() for text in texts)
        tokenizer = Tokenizer.train(every_text, vocab_size)
    for sources in (train, held_out):
        for name, texts in sources.items():
            sources[name] = tokenize(texts, tokenizer)
    return train, held_out, tokenizer


def hold_out_ends(train: dict, held_out: dict, seq_len: int) -> tuple[dict, dict]:
    """Return both, {source: Tokens}. If the held-out documents do not fill a row, as where there
    are few, the last 2% of each source are held out too, or up to 20% if a row needs it. (A
    tokenizer that is trained here has seen these ends.)"""
    if count_tokens(train) == 0:
        train, held_out = held_out, {}
    if count_tokens(held_out) > seq_len:
        return train, held_out
    row = (seq_len + 1) / max(1, count_tokens(train))
    share = max(1 / 50, row)
    share = min(share, 1 / 5)
    starts, ends = {}, {}
    for name, documents in train.items():
        starts[name], ends[f"{name}, end"] = documents.split_end(share)
    return starts, held_out | ends


def count_tokens(sources: dict[str, Tokens]) -> int:
    return sum(int(documents.sizes.sum()) for documents in sources.values())


# ---------------------------------------------------------------------------------------------
# the mixture

def parse_weights(text: str, default: dict[str, float]) -> dict[str, float]:
    """Parse "a=0.7,b=0.3" into {source: weight}; an empty text means the default."""
    if not text:
        return dict(default)
    weights = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        require(equals, f"--weights must be name=0.5,name=0.5, got {text!r}")
        weights[name.strip()] = parse_value("weights", share, float)
    return weights


def mix(sources: dict[str, Tokens], weights: dict[str, float], tokens: int, seed: int,
        unit: int = 1) -> tuple[np.ndarray, dict]:
    """Choose and order documents so that each source has its weight's share of `tokens` tokens, to
    the nearest multiple of `unit`.

    Each source is read in random order, in a new one in each epoch. Its last document is cut to
    meet the share (and keeps its end token). Sources are spread evenly, so that every long stretch
    of the stream has the shares. Returns the stream, (n, 3) int32, and a report {source: {share,
    tokens, available, epochs, warning}}. A row (source, document, size) of the stream stands
    for the first `size` tokens of a document. Raises InputError if the weights do not fit."""
    unknown = sorted(weights.keys() - sources.keys())
    require(not unknown, f"weights for {unknown}, but the sources are {sorted(sources)}")
    total = sum(weights.values())
    require(total > 0 and min(weights.values()) >= 0, f"weights must be >= 0, got {weights}")
    rows = []    # (source, document, size), by source
    places = []  # of the rows in the stream, from 0 to 1
    report = {}
    for name, weight in weights.items():
        units = round(tokens * weight / total / unit)
        wanted = units * unit
        sizes = sources[name].sizes
        available = int(sizes.sum())
        require(available > 0 or wanted == 0, f"source {name} is empty, but its weight is {weight}")
        documents, taken, some_places = choose(name, sizes, wanted, seed)
        number = np.full_like(documents, list(sources).index(name))
        rows.append(np.column_stack((number, documents, taken)))
        places.append(some_places)
        epochs = wanted / max(1, available)
        report[name] = {
            "share": wanted / tokens,
            "tokens": wanted,
            "available": available,
            "epochs": round(epochs, 2),
            # Up to 4 epochs are nearly as good as new text (Muennighoff et al. 2023).
            "warning": "read more than 4 times" if epochs > 4 else "",
        }
    places = np.concatenate(places)
    rows = np.concatenate(rows).astype(np.int32)
    order = np.argsort(places, kind="stable")
    return rows[order], report


def choose(name: str, sizes: np.ndarray, wanted: int, seed: int):
    """Choose documents of one source until they have `wanted` tokens. sizes (documents,) int64.

    Returns three arrays (n,): the chosen documents, how many tokens are taken of each, and their
    places in the stream, from 0 to 1. Every epoch has all documents in an order of its own."""
    n_epochs = wanted // max(1, sizes.sum()) + 1
    documents = []
    offsets = []
    for epoch in range(n_epochs):
        # Keyed by the name, so that adding a source keeps the order within the others.
        rng = np.random.default_rng([seed, crc32(name.encode()), epoch])
        documents.append(rng.permutation(len(sizes)))
        offsets.append(rng.random(len(sizes)))
    documents = np.concatenate(documents)
    offsets = np.concatenate(offsets)
    sizes = sizes[documents]
    before = sizes.cumsum() - sizes  # tokens of the documents ahead
    needed = before < wanted
    before = before[needed]
    taken = np.minimum(sizes[needed], wanted - before)
    places = (before + offsets[needed] * taken) / wanted
    return documents[needed], taken, places


# ---------------------------------------------------------------------------------------------
# sequence packing

class PackedRows:
    """The documents of a stream, one after another, cut into rows of seq_len + 1 tokens.

    rows[[3, 8]] reads two rows: ids and segment_ids, both (2, seq_len + 1) int64. Inputs are
    [:, :-1], targets are [:, 1:]. A segment id is the document's place in the stream; attention
    uses it to stay inside documents. The tokens that do not fill the last row are dropped. Raises
    InputError if they do not fill one row."""

    def __init__(self, sources: list[Tokens], stream: np.ndarray, seq_len: int):
        self.sources = sources
        self.source, self.document, self.size = stream.T
        self.ends = self.size.cumsum(dtype=np.int64)  # of the documents, in the stream
        self.width = seq_len + 1
        tokens = int(self.ends[-1])
        self.n_rows = tokens // self.width
        require(self.n_rows > 0, f"{tokens} tokens do not fill one row of {seq_len} + 1")

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        row_start = np.array(rows)[:, None] * self.width
        position = row_start + np.arange(self.width)  # in the stream; (rows, seq_len + 1)
        place = np.searchsorted(self.ends, position, side="right")
        to_end = self.ends[place] - position  # 1 at the last token of a document
        offset = self.size[place] - to_end    # in the document
        ids = np.empty_like(place)
        for number, tokens in enumerate(self.sources):
            here = self.source[place] == number
            document = self.document[place[here]]
            index = tokens.starts[document] + offset[here]
            is_end = to_end[here] == 1
            index[is_end] = tokens.ends[document[is_end]] - 1  # also of a cut document
            ids[here] = tokens.ids[index]
        return torch.from_numpy(ids), torch.from_numpy(place)


def pack(sources: dict[str, Tokens], weights: dict[str, float], tokens: int, seq_len: int,
         seed: int, long_share: float = 0.0) -> tuple[PackedRows, dict]:
    """Mix the sources and cut them into rows. Return the rows and the report of `mix`.

    With a long_share s, a share s of the rows consists of pieces of longer documents, one piece per
    row, and the other rows hold shorter documents only: Qwen2.5-Turbo trains 40% of its sequences
    at the full length of each stage (section 3.3). Within both kinds, sources keep their relative
    weights."""
    require(0 <= long_share < 1, f"--long_share must be a share in [0, 1), got {long_share}")
    if long_share == 0:
        stream, report = mix(sources, weights, tokens, seed)
        return PackedRows(list(sources.values()), stream, seq_len), report
    width = seq_len + 1
    long_tokens = int(tokens * long_share) // width * width
    require(long_tokens > 0, f"--long_share {long_share} of --tokens {tokens} is not one row")
    kinds = (
        ("longer", Tokens.long_pieces, long_tokens, width),  # whole pieces: each fills its row
        ("shorter", Tokens.short_documents, tokens - long_tokens, 1),
    )
    parts = []    # of the sources, one per kind
    streams = []
    report = {}
    for kind, select, kind_tokens, unit in kinds:
        documents = {}
        for name, source in sources.items():
            some = select(source, width)
            if name in weights and len(some.starts):
                documents[name] = some
        require(len(documents) > 0, f"--long_share: no document is {kind} than {width} tokens")
        some_weights = {name: weights[name] for name in documents}
        stream, part_report = mix(documents, some_weights, kind_tokens, seed, unit)
        require(len(stream) > 0,
                f"--long_share {long_share}: no source's share is a {kind} row")
        offset = [len(parts), 0, 0]  # sources are numbered on from those of the other kind
        streams.append(stream + offset)
        parts.extend(documents.values())
        for name, row in part_report.items():
            report[f"{name}, {kind}"] = row
    return PackedRows(parts, np.concatenate(streams), seq_len), report


def held_out_rows(held_out: dict[str, Tokens], seq_len: int, tokens: int):
    """Return ids and segment_ids (rows, seq_len + 1) of held-out documents: at most 256 rows, and
    at most a tenth of the training `tokens`, so that a short run is not spent on measuring."""
    sources = list(held_out.values())
    stream = []
    for number, documents in enumerate(sources):
        for document, size in enumerate(documents.sizes):
            stream.append((number, document, size))
    random.Random(0).shuffle(stream)  # so that the rows are of all sources, not of the first
    size = sum(size for _, _, size in stream)
    require(size > seq_len, "--data is too small: its held-out part, one document in fifty or the "
            f"last fifth of the tokens, does not fill a row of --seq_len {seq_len}")
    rows = PackedRows(sources, np.array(stream), seq_len)
    most = max(1, tokens // (10 * seq_len))
    count = min(256, most, len(rows))
    return rows[range(count)]
