"""Preference pairs: from rollouts, from files, reviewed."""
import random
from collections import Counter

from lib.args import require
from lib.files import read_jsonl
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# by programs

def review(pairs: list[dict], tokenizer, max_len: int, max_ratio: float = 0,
           check_format: bool = False, scorer=None, min_margin: float = 0):
    """-> the pairs to learn from, their rows (ids of prompt, chosen, rejected), and how many were
    dropped for which reason: the first that holds."""
    kept, rows, dropped, seen = [], [], Counter(), set()
    for pair in pairs:
        prompt, chosen, rejected = row = tokenize_pair(tokenizer, pair)
        short, long = sorted((len(chosen), len(rejected)))
        texts = [tokenizer.decode(answer[:-1]) for answer in (chosen, rejected)]
        half = "\ufffd" in texts[0] or texts[0].count("```") % 2 == 1  # a character, a code block
        key = str((prompt, sorted((chosen, rejected))))
        reason = (
            "too long" if len(prompt) + long > max_len else
            "empty chosen answer" if not texts[0].strip() else
            "equal answers" if chosen == rejected else
            "seen before, or its opposite" if key in seen else
            "one answer much longer" if 0 < max_ratio < long / short else
            "ill-formed chosen answer" if check_format and half else "")
        if scorer and not reason:
            good, bad = scorer.score([pair["prompt"]] * 2, texts)
            reason = "reward model's margin" if good - bad < min_margin else ""
        seen.add(key)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(pair)
            rows.append(row)
    return kept, rows, dict(dropped)


# ---------------------------------------------------------------------------------------------
# data

def pair_responses(answers: list, per_query: int, seed: int) -> list[dict]:
    """Rollouts -> pairs: passing = chosen, failing = rejected, among all the answers to one query,
    whichever policy gave them. A query whose answers all pass or all fail teaches nothing here and
    gives no pair; equal texts are one answer, and one that was cut is none."""
    r, pairs, by_prompt = random.Random(seed), [], {}
    for answer in answers:
        by_prompt.setdefault(str(answer.query["prompt"]), []).append(answer)
    for group in by_prompt.values():
        query = group[0].query
        passed = sorted({a.text for a in group if a.score == 1})
        failed = sorted({a.text for a in group if a.score < 1 and a.finished})
        k = min(per_query, len(passed), len(failed))
        for chosen, rejected in zip(r.sample(passed, k), r.sample(failed, k), strict=True):
            pairs.append({"prompt": query["prompt"], "chosen": chosen, "rejected": rejected,
                          "domain": query["domain"]})
    return pairs


def read_pairs(path: str) -> list[dict]:
    """JSONL of {"prompt", "chosen", "rejected"}, each a text or messages: TRL's shapes."""
    def readable(side):
        return isinstance(side, str) or (isinstance(side, list) and len(side) > 0 and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in side))
    pairs = []
    for number, row in read_jsonl(path):
        bad = [k for k in ("prompt", "chosen", "rejected") if not readable(row.get(k))]
        require(not bad, f"{path}:{number}: {', '.join(bad)}: want a text or messages, in a row of "
                '"prompt", "chosen", "rejected"')
        pairs.append(row)
    require(len(pairs) > 0, f"{path}: holds no pairs")
    return pairs


def tokenize_pair(tokenizer: Tokenizer, pair: dict) -> tuple[list[int], list[int], list[int]]:
    """-> ids of the prompt, of the chosen and of the rejected answer (content + <|im_end|>)."""
    texts = (y if isinstance(y, str) else y[-1]["content"]
             for y in (pair["chosen"], pair["rejected"]))
    return tokenizer.render_prompt(pair["prompt"]), *(
        tokenizer.encode(text) + [tokenizer.im_end_id] for text in texts)


def tokenize_pairs(pairs: list[dict], tokenizer: Tokenizer, max_len: int, listwise=False):
    """-> rows of (chosen, rejected): lists of answers' ids after their prompt's, one of each, or,
    listwise, all that a prompt's pairs have."""
    rows = {}
    for i, pair in enumerate(pairs):
        prompt, *answers = tokenize_pair(tokenizer, pair)
        if len(prompt) + max(map(len, answers)) <= max_len:
            row = rows.setdefault(tuple(prompt) if listwise else i, ([], []))
            for side, answer in zip(row, answers, strict=True):
                if prompt + answer not in side:
                    side.append(prompt + answer)
    return list(rows.values())
