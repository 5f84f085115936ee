"""From documents to training rows: token ids, a mixture of sources, packed rows.

The report samples some domains down (e-commerce, social media, entertainment) and others up
(technology, science, academic work); its ratios are not disclosed (section 3.1). Here a weight is a
share of *tokens*: by documents, a source of long ones would take far more.

    sources = {"web": tokenize(web_texts, tokenizer), "code": tokenize(code_texts, tokenizer)}
    stream, report = mix(sources, {"web": 0.7, "code": 0.3}, tokens=1_000_000, seed=0)
    rows = PackedRows(list(sources.values()), stream, seq_len=128)
    ids, segment_ids = rows[[3, 8]]  # two rows of 129 tokens each
"""
import hashlib
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from lib.args import InputError, require
from lib.files import atomic_path

PIECE = 2**16                               # characters that are encoded at once, or some more
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def is_held_out(text: str) -> bool:
    """Say whether a document only measures the loss: one in fifty, chosen by its hash, so that the
    same ones are held out whatever the order, the mixture or the seed."""
    content = text.encode("utf-8", "replace")
    digest = hashlib.blake2b(content, digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50 == 0


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
        counts = self.sizes // length          # pieces per document
        earlier = counts.cumsum() - counts     # pieces of the documents before it
        pieces = np.arange(counts.sum())
        number = pieces - np.repeat(earlier, counts)  # within its document
        starts = np.repeat(self.starts, counts) + length * number
        return Tokens(self.ids, starts, starts + length)

    def short_documents(self, length: int) -> "Tokens":
        """Select the documents with fewer than `length` tokens."""
        short = self.sizes < length
        return Tokens(self.ids, self.starts[short], self.ends[short])

    def split_end(self, share: float) -> tuple["Tokens", "Tokens"]:
        """Part the last `share` of all tokens, which must have no gaps, from those before."""
        cut = int(len(self.ids) * (1 - share))
        begins_before = self.starts < cut
        ends_behind = self.ends > cut
        cut_ends = self.ends[begins_before].clip(max=cut)
        cut_starts = self.starts[ends_behind].clip(min=cut)
        first = Tokens(self.ids, self.starts[begins_before], cut_ends)
        last = Tokens(self.ids, cut_starts, self.ends[ends_behind])
        return first, last


def id_type(tokenizer):
    """Return the smallest type that holds every id: int64 takes two to four times the space."""
    n_ids = max(tokenizer.n_vocab, tokenizer.eos_id + 1)
    return np.uint16 if n_ids <= 2**16 else np.uint32


def pieces(texts):
    """Yield (piece, whether it ends its text). A text is cut about every PIECE characters, at a
    line end between two visible characters: no token crosses it."""
    for text in texts:
        start = 0
        while cut := LINE_END.search(text, start + PIECE):
            yield text[start:cut.end()], False
            start = cut.end()
        yield text[start:], True


def id_arrays(texts, tokenizer):
    """Yield (ids, whether they end a text) piece by piece, with <|endoftext|> at the end of a text
    as in Qwen's pre-training."""
    dtype = id_type(tokenizer)
    waiting = pieces(texts)
    while chunk := list(islice(waiting, 100)):  # a list of ints takes 10 times an array's space
        batch = tokenizer.encode_batch([piece for piece, _ in chunk])
        for ids, (_, is_end) in zip(batch, chunk, strict=True):
            if is_end:
                ids.append(tokenizer.eos_id)
            yield np.array(ids, dtype), is_end


def tokenize(texts, tokenizer) -> Tokens:
    arrays = [np.empty(0, id_type(tokenizer))]  # np.concatenate refuses an empty list
    bounds = [0]
    size = 0
    for ids, is_end in id_arrays(texts, tokenizer):
        arrays.append(ids)
        size += len(ids)
        if is_end:
            bounds.append(size)
    bounds = np.array(bounds)
    return Tokens(np.concatenate(arrays), bounds[:-1], bounds[1:])


def write_tokens(stem: Path, texts, tokenizer) -> None:
    """Write {stem}.bin (ids) and {stem}.ends (int64): what `read_tokens` maps into memory."""
    size = 0
    with atomic_path(f"{stem}.bin") as ids_path, atomic_path(f"{stem}.ends") as ends_path:
        with open(ids_path, "wb") as ids_file, open(ends_path, "wb") as ends_file:
            for ids, is_end in id_arrays(texts, tokenizer):
                size += len(ids)
                ids_file.write(ids)
                if is_end:
                    ends_file.write(np.int64(size))


def read_tokens(stem: Path, tokenizer) -> Tokens:
    """Map the files of `write_tokens` into memory. Raises InputError if they do not match."""
    path = Path(f"{stem}.bin")
    ids = np.empty(0, id_type(tokenizer))
    if path.stat().st_size > 0:  # an empty file cannot be mapped
        ids = np.memmap(path, id_type(tokenizer), "r")
    ends = np.fromfile(f"{stem}.ends", np.int64)
    bounds = np.append(0, ends)
    require(len(ids) == bounds[-1],
            f"{stem}.bin and {stem}.ends are not of one piece: run python -m data again")
    return Tokens(ids, bounds[:-1], bounds[1:])


# ---------------------------------------------------------------------------------------------
# the mixture

def parse_weights(text: str, default: dict[str, float]) -> dict[str, float]:
    """Parse "a=0.7,b=0.3" into {source: weight}; an empty text means the default."""
    if not text:
        return dict(default)
    weights = {}
    try:
        for part in text.split(","):
            name, value = part.split("=")
            weights[name.strip()] = float(value)
    except ValueError:
        raise InputError(f"--weights must be name=0.5,name=0.5, got {text!r}") from None
    return weights


def mix(sources: dict[str, Tokens], weights: dict[str, float], tokens: int,
        seed: int) -> tuple[np.ndarray, dict]:
    """Choose and order documents so that each source has its weight's share of `tokens` tokens.

    Each source is read in random order, in a new one in each epoch. Its last document is cut to
    meet the share (and keeps its end token). Sources are spread evenly, so that every long stretch
    of the stream has the shares. Returns the stream, (n, 3) int32, and a report {source: {weight,
    share, tokens, available, epochs, warning}}. A row (source, document, size) of the stream stands
    for the first `size` tokens of a document. Raises InputError if the weights do not fit."""
    unknown = sorted(set(weights) - set(sources))
    require(not unknown, f"weights for {unknown}, but the sources are {sorted(sources)}")
    total = sum(weights.values())
    negative = any(weight < 0 for weight in weights.values())
    require(total > 0 and not negative, f"weights must be >= 0, got {weights}")
    streams = []
    places = []
    report = {}
    numbers = {name: number for number, name in enumerate(sources)}
    for name, weight in weights.items():
        wanted = round(tokens * weight / total)
        sizes = sources[name].sizes
        available = int(sizes.sum())
        require(available > 0 or wanted == 0, f"source {name} is empty, but its weight is {weight}")
        for items, place in read_epochs(name, numbers[name], sizes, wanted, seed):
            streams.append(items)
            places.append(place)
        epochs = wanted / max(1, available)
        # Up to 4 epochs are nearly as good as new text (Muennighoff et al. 2023).
        warning = "read more than 4 times" if epochs > 4 else ""
        report[name] = {"weight": weight, "share": wanted / tokens, "tokens": wanted,
                        "available": available, "epochs": round(epochs, 2), "warning": warning}
    places = np.concatenate(places)
    stream = np.concatenate(streams)
    order = np.argsort(places, kind="stable")
    return stream[order], report


def read_epochs(name: str, number: int, sizes: np.ndarray, wanted: int, seed: int):
    """Yield the items of each epoch over one source, (n, 3), and their places in the stream, (n,)
    from 0 to 1, until it has given `wanted` tokens."""
    done = 0
    epoch = 0
    while done < wanted:
        # Keyed by the name, so that adding a source keeps the order within the others.
        random = np.random.default_rng([seed, crc32(name.encode()), epoch])
        documents = random.permutation(len(sizes))
        ends = done + sizes[documents].cumsum()
        before = ends - sizes[documents]  # tokens ahead of each
        needed = before < wanted
        documents = documents[needed]
        before = before[needed]
        taken = np.minimum(sizes[documents], wanted - before)
        numbers = np.full_like(documents, number)
        items = np.column_stack((numbers, documents, taken))
        inside = random.random(len(documents)) * taken
        place = (before + inside) / wanted
        yield items.astype(np.int32), place
        done = int(before[-1] + taken[-1])
        epoch += 1


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
        self.stream = stream
        self.width = seq_len + 1
        self.ends = np.cumsum(stream[:, 2], dtype=np.int64)  # of each item in the stream
        tokens = int(self.ends[-1])
        self.n_rows = tokens // self.width
        require(self.n_rows > 0, f"{tokens} tokens do not fill one row of {seq_len} + 1")

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.empty((len(rows), self.width), dtype=np.int64)
        segment_ids = np.empty((len(rows), self.width), dtype=np.int64)
        for i, row in enumerate(rows):
            self.fill(row, ids[i], segment_ids[i])
        return torch.from_numpy(ids), torch.from_numpy(segment_ids)

    def fill(self, row: int, ids: np.ndarray, segment_ids: np.ndarray) -> None:
        """Write row number `row` into ids and segment_ids, both (seq_len + 1,)."""
        row_start = row * self.width  # in the stream
        place = int(np.searchsorted(self.ends, row_start, side="right"))
        filled = 0
        while filled < self.width:
            source, document, size = self.stream[place].tolist()
            tokens = self.sources[source]
            document_start = self.ends[place] - size  # in the stream
            skipped = row_start + filled - document_start  # its tokens that earlier rows hold
            count = min(size - skipped, self.width - filled)
            start = tokens.starts[document] + skipped
            end = filled + count
            ids[filled:end] = tokens.ids[start:start + count]
            segment_ids[filled:end] = place
            if skipped + count == size:  # a document that was cut keeps its end token
                last = tokens.ends[document] - 1
                ids[end - 1] = tokens.ids[last]
            filled = end
            place += 1
