"""Preference pairs: made from rollouts, read from files, reviewed (report sections 4.2 and 4.3).

A pair is a dict, one line of a JSONL file: {"prompt", "chosen", "rejected"}, each a text or
messages, as for TRL; "domain" where it is known. dpo.py and reward.py learn from `PairIds`.
"""
import random
from collections import Counter
from typing import NamedTuple

from lib.args import require
from lib.files import read_jsonl
from tokenizer import Tokenizer


class PairIds(NamedTuple):
    """A tokenized pair. Both answers end in <|im_end|>."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


# ---------------------------------------------------------------------------------------------
# from rollouts and files

def pair_responses(answers: list, per_query: int, seed: int) -> list[dict]:
    """Pair passing answers (chosen) with failing ones (rejected) to the same query (section 4.2).

    answers: sample.Rollout of any policies. Queries whose answers all pass or all fail give no
    pair. Equal texts count once, and an answer that was cut off is not a rejected one."""
    generator = random.Random(seed)
    by_prompt = {}
    for answer in answers:
        by_prompt.setdefault(str(answer.query["prompt"]), []).append(answer)
    pairs = []
    for group in by_prompt.values():
        query = group[0].query
        passed = sorted({a.text for a in group if a.score == 1})
        failed = sorted({a.text for a in group if a.score < 1 and a.finished})
        n = min(per_query, len(passed), len(failed))
        some_passed = generator.sample(passed, n)
        some_failed = generator.sample(failed, n)
        for chosen, rejected in zip(some_passed, some_failed, strict=True):
            pairs.append({"prompt": query["prompt"], "chosen": chosen, "rejected": rejected,
                          "domain": query["domain"]})
    return pairs


def read_pairs(path: str) -> list[dict]:
    """Read a JSONL file of pairs. Raise InputError with the line of a bad one."""
    pairs = []
    for number, row in read_jsonl(path):
        bad = [key for key in ("prompt", "chosen", "rejected") if not is_text(row.get(key))]
        require(not bad, f"{path}:{number}: {', '.join(bad)}: must be a text or messages, in a row "
                'of "prompt", "chosen", "rejected"')
        pairs.append(row)
    require(len(pairs) > 0, f"{path}: holds no pairs")
    return pairs


def is_text(side) -> bool:
    """Is it a text, or messages that each have one?"""
    if isinstance(side, str):
        return True
    if not isinstance(side, list) or not side:
        return False
    return all(isinstance(message, dict) and isinstance(message.get("content"), str)
               for message in side)


def tokenize_pair(pair: dict, tokenizer: Tokenizer) -> PairIds:
    sides = []
    for side in (pair["chosen"], pair["rejected"]):
        text = side if isinstance(side, str) else side[-1]["content"]
        sides.append(tokenizer.encode(text) + [tokenizer.im_end_id])
    return PairIds(tokenizer.render_prompt(pair["prompt"]), sides[0], sides[1])


def tokenize_pairs(pairs: list[dict], tokenizer: Tokenizer, max_len: int) -> list[PairIds]:
    """Tokenize pairs. Drop those in which the prompt and an answer exceed max_len tokens."""
    rows = [tokenize_pair(pair, tokenizer) for pair in pairs]
    return [row for row in rows if longest(row) <= max_len]


def longest(row: PairIds) -> int:
    return len(row.prompt) + max(len(row.chosen), len(row.rejected))


# ---------------------------------------------------------------------------------------------
# review by programs; data/label.py is the review by people

class Review(NamedTuple):
    pairs: list[dict]
    rows: list[PairIds]        # of the pairs, in the same order
    dropped: dict[str, int]    # reason -> how many


def review(pairs: list[dict], tokenizer: Tokenizer, max_len: int, max_ratio: float = 0.0,
           check_format: bool = False, scorer=None, min_margin: float = 0.0) -> Review:
    """Drop the pairs from which nothing should be learned, and count why.

    The report's pairs are reviewed automatically (section 4.2); it does not disclose how, so the
    reasons are our choice. max_ratio > 0 drops pairs in which one answer is so many times as long
    as the other. check_format drops ill-formed chosen answers. scorer, a RewardModel, drops pairs
    whose chosen answer does not beat the rejected one by min_margin."""
    kept, rows = [], []
    dropped = Counter()
    seen = set()
    for pair in pairs:
        row = tokenize_pair(pair, tokenizer)
        chosen = tokenizer.decode(row.chosen[:-1])
        rejected = tokenizer.decode(row.rejected[:-1])
        both = str((row.prompt, sorted((row.chosen, row.rejected))))  # also of the opposite pair
        if longest(row) > max_len:
            reason = "too long"
        elif not chosen.strip():
            reason = "empty chosen answer"
        elif row.chosen == row.rejected:
            reason = "equal answers"
        elif both in seen:
            reason = "seen before, or its opposite"
        elif max_ratio > 0 and length_ratio(row) > max_ratio:
            reason = "one answer much longer"
        elif check_format and is_torn(chosen):
            reason = "ill-formed chosen answer"
        elif scorer and margin(scorer, pair, chosen, rejected) < min_margin:
            reason = "reward model's margin"
        else:
            reason = ""
            kept.append(pair)
            rows.append(row)
        seen.add(both)
        if reason:
            dropped[reason] += 1
    return Review(kept, rows, dict(dropped))


def length_ratio(row: PairIds) -> float:
    short, long = sorted((len(row.chosen), len(row.rejected)))
    return long / short


def is_torn(text: str) -> bool:
    """Does it end inside a character or inside a code block?"""
    return "\ufffd" in text or text.count("```") % 2 == 1


def margin(scorer, pair: dict, chosen: str, rejected: str) -> float:
    chosen_score, rejected_score = scorer.score([pair["prompt"]] * 2, [chosen, rejected])
    return chosen_score - rejected_score
