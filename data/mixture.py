"""Tokens: documents -> mixture -> packed rows."""
import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from lib.args import InputError, require
from lib.files import atomic_path

def is_held_out(text: str) -> bool:
    """One document in fifty, by its hash, is for measuring the loss only: the same ones whatever
    the order, the mixture or the seed."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 50 == 0


# ---------------------------------------------------------------------------------------------
# tokens: documents -> mixture -> packed rows

@dataclass
class Tokens:
    """Documents as one long array of ids, in memory or memory-mapped, with the places where each
    starts and ends."""
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return self.ends - self.starts

    def long_pieces(self, length: int) -> "Tokens":
        """Pieces of exactly `length`, as many as the documents hold."""
        n = self.sizes // length
        starts = np.repeat(self.starts - length * (n.cumsum() - n), n) + length * np.arange(n.sum())
        return Tokens(self.ids, starts, starts + length)

    def short_documents(self, length: int) -> "Tokens":
        some = self.sizes < length
        return Tokens(self.ids, self.starts[some], self.ends[some])


def id_arrays(texts, tok):
    """An array per text, each ending in <|endoftext|> as in Qwen's packed pre-training. uint16 if
    the vocabulary fits, else uint32: int64 is 2-4 times it."""
    texts = iter(texts)
    while chunk := list(islice(texts, 1000)):  # Python's lists of ints live 1000 texts at a time
        for ids in tok.encode_batch(chunk):
            yield np.array([*ids, tok.eos_id], dtype=id_type(tok))


def id_type(tok):
    return np.uint16 if max(tok.n_vocab, tok.eos_id + 1) <= 2**16 else np.uint32


def tokenize(texts, tok) -> Tokens:
    arrays = [np.empty(0, id_type(tok)), *id_arrays(texts, tok)]
    ends = np.cumsum([len(ids) for ids in arrays])
    return Tokens(np.concatenate(arrays), ends[:-1], ends[1:])


def write_tokens(stem: Path, texts, tok) -> None:
    """{stem}.bin, the ids, and {stem}.ends, int64: what `read_tokens` maps into memory."""
    end = 0
    with atomic_path(f"{stem}.bin") as ids, atomic_path(f"{stem}.ends") as ends:
        with open(ids, "wb") as ids_file, open(ends, "wb") as ends_file:
            for array in id_arrays(texts, tok):
                end += len(array)
                ids_file.write(array)
                ends_file.write(np.int64(end))


def read_tokens(stem: Path, tok) -> Tokens:
    size = Path(f"{stem}.bin").stat().st_size  # an empty file cannot be mapped
    ids = np.memmap(f"{stem}.bin", id_type(tok), "r") if size else np.empty(0, id_type(tok))
    ends = np.fromfile(f"{stem}.ends", np.int64)
    require(len(ids) == (ends[-1] if len(ends) else 0),
            f"{stem}.bin and .ends are not of one piece: run data/ again")
    return Tokens(ids, np.append(0, ends)[:-1], ends)


def parse_weights(text: str, default: dict[str, float]) -> dict[str, float]:
    """ "a=0.7,b=0.3" -> {source: weight}; empty -> the default."""
    try:
        pairs = (part.split("=") for part in text.split(",") if part)
        return {name.strip(): float(value) for name, value in pairs} or dict(default)
    except ValueError:
        raise InputError(f"--weights wants name=0.5,name=0.5, got {text!r}") from None


def mix(sources: dict[str, Tokens], weights: dict[str, float], tokens: int,
        seed: int) -> tuple[np.ndarray, dict]:
    """A stream of `tokens` tokens in which each source has its weight's share of the *tokens*
    (R2.5): by documents, a source of long ones would take far more than its weight.

    A source is read in random order, a new one in every epoch; its last document is cut to meet the
    share (and keeps its end token). Sources are spread evenly, so that every long stretch of the
    stream has the shares. A pure function. Returns (stream (n, 3): number of the source in
    `sources`, document, tokens of it; report {source: {weight, share, tokens, available, documents,
    epochs, warning}}); raises InputError."""
    unknown, total = set(weights) - set(sources), sum(weights.values())
    require(not unknown, f"weights for {sorted(unknown)}, but the sources are {sorted(sources)}")
    require(total > 0 and min(weights.values()) >= 0, f"weights must be >= 0, got {weights}")
    stream, places, report = [], [], {}
    for name, weight in weights.items():
        want, done, epoch, count = round(tokens * weight / total), 0, 0, 0
        sizes, number = sources[name].sizes, list(sources).index(name)
        available = int(sizes.sum())
        require(available > 0 or want == 0, f"source {name} is empty, but its weight is {weight}")
        while done < want:
            # Keyed by name, so that adding a source leaves the order within the others as it was.
            random = np.random.default_rng([seed, crc32(name.encode()), epoch])
            docs = random.permutation(len(sizes))
            before = done + np.append(0, sizes[docs].cumsum()[:-1])
            docs, before = docs[before < want], before[before < want]
            size = np.minimum(sizes[docs], want - before)
            places.append((before + random.random(len(docs)) * size) / want)
            stream.append(np.stack((np.full(len(docs), number), docs, size), 1).astype(np.int32))
            done, count, epoch = int(before[-1] + size[-1]), count + len(docs), epoch + 1
        # Muennighoff et al. 2023: up to 4 epochs are nearly as good as new text.
        epochs = want / max(1, available)
        report[name] = {"weight": weight, "share": want / tokens, "tokens": want,
                        "available": available, "documents": count, "epochs": round(epochs, 2),
                        "warning": "read more than 4 times" if epochs > 4 else ""}
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(stream)[order], report


class PackedRows:
    """The documents of a stream (see `mix`), one after another, cut into rows of seq_len + 1
    tokens. rows[[3, 8]] reads two of them: ids and segment_ids, both (2, seq_len + 1) int64. Inputs
    are [:, :-1], targets [:, 1:]; a segment id is the document's place in the stream, for attention
    that stays inside documents. What fills no row is dropped; InputError if that is all."""

    def __init__(self, sources: list[Tokens], stream: np.ndarray, seq_len: int):
        self.sources, self.stream, self.width = sources, stream, seq_len + 1
        self.ends = np.cumsum(stream[:, 2], dtype=np.int64)
        self.n = int(self.ends[-1]) // self.width if len(stream) else 0
        require(self.n > 0, f"{stream[:, 2].sum()} tokens do not fill one row of {seq_len} + 1")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        out = np.empty((2, len(rows), self.width), dtype=np.int64)
        for r, row in enumerate(rows):
            done, i = 0, int(np.searchsorted(self.ends, row * self.width, side="right"))
            while done < self.width:
                source, doc, size = self.stream[i].tolist()
                tokens, skip = self.sources[source], row * self.width + done - self.ends[i] + size
                n, start = min(size - skip, self.width - done), tokens.starts[doc] + skip
                out[0, r, done:done + n] = tokens.ids[start:start + n]
                out[1, r, done:done + n] = i
                done, i = done + n, i + 1
                if skip + n == size:  # also of a document that was cut
                    out[0, r, done - 1] = tokens.ids[tokens.ends[doc] - 1]
        return torch.from_numpy(out[0]), torch.from_numpy(out[1])
