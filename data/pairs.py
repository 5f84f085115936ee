"""Preference pairs: made from rollouts, read from files, reviewed (report sections 4.2 and 4.3).

A pair is a dict, one line of a JSONL file: {"prompt", "chosen", "rejected"}, "domain" where it is
known, and "criteria" where people or judges labelled it (data/label.py). The prompt is a text or
messages, the answers are texts; `PairFile` takes the shapes of other projects, too. dpo.py and
reward.py learn from `PairIds`.
"""
import random
import re
from array import array
from collections import Counter
from typing import NamedTuple

from torch.utils.data import Subset

from data.conversations import to_messages
from data.mixture import parse_weights
from lib.args import require
from lib.chat import check_messages, parse_tools
from lib.files import JsonlFile, at_line
from tasks.steps import steps_hold
from tokenizer import Tokenizer

WANTED = 'expected "prompt", "chosen" and "rejected", each a text or messages: docs/your-data.md'
ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)
CRITERIA = ("truthfulness", "helpfulness", "conciseness", "relevance", "harmlessness", "debiasing")


class PairIds(NamedTuple):
    """A tokenized pair. Both answers end in <|im_end|>."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    label: float = 1.0  # the probability that chosen is the better answer


# ---------------------------------------------------------------------------------------------
# from rollouts and files

def pair_responses(answers: list, per_query: int, seed: int) -> list[dict]:
    """Pair passing answers (chosen) with failing ones (rejected) to the same query (section 4.2).

    answers: sample.Rollout of any policies. Queries whose answers all pass or all fail give no
    pair. Equal texts count once, and an answer that was cut off is not a rejected one."""
    generator = random.Random(seed)
    by_prompt = {}
    for answer in answers:
        asked = str((answer.query["prompt"], answer.query.get("tools")))
        by_prompt.setdefault(asked, []).append(answer)
    pairs = []
    for group in by_prompt.values():
        query = group[0].query
        texts_passed = {a.text for a in group if a.score == 1}
        texts_failed = {a.text for a in group if a.score < 1 and a.finished}
        passed = sorted(texts_passed - texts_failed)  # a program's tests may run out of time once
        failed = sorted(texts_failed - texts_passed)
        n = min(per_query, len(passed), len(failed))
        some_passed = generator.sample(passed, n)
        some_failed = generator.sample(failed, n)
        rest = {key: query[key] for key in ("domain", "tools") if query.get(key)}
        for chosen, rejected in zip(some_passed, some_failed, strict=True):
            pair = {"prompt": query["prompt"], "chosen": chosen, "rejected": rejected}
            pairs.append(pair | rest)
    return pairs


class PairFile:
    """The pairs of a JSONL file of any shape in docs/your-data.md, read when they are asked for.

    Memory holds only where each begins. All are read once at the start, so that InputError names
    the line of a bad one."""

    def __init__(self, path: str):
        self.file = JsonlFile(path)
        self.places = array("q")
        for number, place, row in self.file.rows():
            with at_line(path, number):
                to_pair(row)
            self.places.append(place)
        require(len(self.places) > 0, f"{path}: holds no pairs")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict:
        return to_pair(self.file.read(self.places[i]))


def to_pair(row: dict) -> dict:
    """Return the row with a prompt that is a text or messages, and with two texts as answers.

    Answers given as messages may repeat the prompt or go on from it. Whatever both have in front of
    their last message becomes part of the prompt."""
    soft_label(row, None)  # refuses bad "criteria"
    require(not row.get("system"),
            '"system" of a pair cannot be read: its place is a system message in the prompt')
    parse_tools(row.get("tools"))  # refuse bad ones now
    prompt = row.get("prompt", row.get("conversations"))
    sides = [row.get("chosen"), row.get("rejected")]
    texts = all(isinstance(text, str) for text in (prompt, *sides))
    if texts and not is_transcript(prompt) and not all(map(is_transcript, sides)):
        require(prompt != "", "the prompt is empty")
        return row | {"prompt": prompt}
    question = [] if prompt is None else turns_of(prompt)
    if question and question[-1] == {"role": "assistant", "content": ""}:
        question.pop()  # of a transcript that ends in "Assistant:"
    chosen, rejected = [whole_conversation(question, side) for side in sides]
    check_messages(chosen)
    check_messages(rejected)
    for answer in (chosen[-1], rejected[-1]):
        require(answer["role"] == "assistant" and not answer.get("tool_calls"),
                "the last of the messages in chosen and in rejected must be the assistant's text")
    require(chosen[:-1] == rejected[:-1],
            "chosen and rejected must be the same messages but for the last one")
    require(len(chosen) > 1 and chosen[-2]["role"] in ("user", "tool"),
            "the messages before the answer must end in the user's: an answer that goes on with "
            "words of the assistant cannot be read")
    return row | {"prompt": chosen[:-1], "chosen": chosen[-1]["content"],
                  "rejected": rejected[-1]["content"]}


def whole_conversation(prompt: list[dict], side) -> list[dict]:
    """Return the messages up to an answer, `side`, with the prompt in front where it is not yet."""
    if isinstance(side, str) and not is_transcript(side):
        require(len(prompt) > 0, WANTED)
        return prompt + to_messages(side, "assistant")
    side = turns_of(side)
    if not prompt:
        return side
    if side[0]["role"] in ("assistant", "tool"):
        return prompt + side
    # A system message may stand in front of one of the two only.
    if prompt[0]["role"] == "system" and side[0]["role"] != "system":
        side = prompt[:1] + side
    if side[0]["role"] == "system" and prompt[0]["role"] != "system":
        prompt = side[:1] + prompt
    require(side[:len(prompt)] == prompt,
            "the messages of chosen and rejected must begin with the prompt or go on from it")
    return side


def turns_of(side) -> list[dict]:
    """Return messages, given as messages, as one of them, as a question or as a transcript."""
    if not is_transcript(side):
        return to_messages(side)
    messages = []
    for speaker, text in TURN.findall(side):
        require(not messages or ROLES[speaker] != messages[-1]["role"],
                'the turns after "\\n\\nHuman:" and "\\n\\nAssistant:" must alternate')
        messages.append({"role": ROLES[speaker], "content": text.strip()})
    return messages


def is_transcript(side) -> bool:
    """Is it "\\n\\nHuman: ... \\n\\nAssistant: ...", as in hh-rlhf?"""
    return isinstance(side, str) and side.startswith("\n\nHuman:")


def parse_criteria(text: str) -> dict[str, float]:
    """Return the weights of --weights, such as "overall=1,helpfulness=2", by name."""
    weights = parse_weights(text, {})
    known = ("overall", *CRITERIA)
    for name in weights:
        require(name in known, f"--weights: {name} is none of {', '.join(known)}")
    return weights


def soft_label(pair: dict, weights: dict[str, float] | None) -> float:
    """Return the probability that chosen is the better answer: the weighted mean, over its
    "criteria", of the share of judges who prefer chosen (our choice).

    No weights mean equal ones. A pair without a weighted criterion has label 1."""
    shares = {} if pair.get("criteria") is None else pair["criteria"]
    valid = isinstance(shares, dict) and all(
        isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares.values())
    require(valid, '"criteria" must be {name: share of judges who prefer chosen, 0 to 1}')
    total = 0.0
    votes = 0.0
    for name, share in shares.items():
        weight = weights.get(name, 0.0) if weights else 1.0
        total += weight
        votes += weight * share
    return votes / total if total else 1.0


def tokenize_pair(pair: dict, tokenizer: Tokenizer, weights=None) -> PairIds:
    """Return the token ids of a pair. Where its label prefers the rejected answer, the two change
    places: "chosen" is what training should prefer."""
    chosen = tokenizer.encode(pair["chosen"]) + [tokenizer.im_end_id]
    rejected = tokenizer.encode(pair["rejected"]) + [tokenizer.im_end_id]
    prompt = tokenizer.render_prompt(pair["prompt"], pair.get("tools"))
    label = soft_label(pair, weights)
    if label < 0.5:
        return PairIds(prompt, rejected, chosen, 1 - label)
    return PairIds(prompt, chosen, rejected, label)


class TokenizedPairs:
    """The PairIds of pairs, tokenized when they are asked for: 150,000 need not fit in memory."""

    def __init__(self, pairs, tokenizer: Tokenizer, weights=None):
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.weights = weights

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> PairIds:
        return tokenize_pair(self.pairs[i], self.tokenizer, self.weights)


def tokenize_pairs(pairs, tokenizer: Tokenizer, max_len: int, weights=None) -> Subset:
    """Select the tokenized pairs in which neither answer exceeds max_len tokens with its prompt."""
    rows = TokenizedPairs(pairs, tokenizer, weights)
    return Subset(rows, array("q", [i for i, row in enumerate(rows) if longest(row) <= max_len]))


def read_held_out(path: str, tokenizer: Tokenizer, max_len: int, weights=None) -> list[PairIds]:
    """Return the tokenized pairs of --eval_data, none without one. A tie has no right order."""
    if not path:
        return []
    rows = tokenize_pairs(PairFile(path), tokenizer, max_len, weights)
    require(len(rows) > 0, f"--eval_data {path}: no pair within --max_len {max_len} tokens")
    rows = [row for row in rows if row.label > 0.5]
    print(f"{len(rows)} held-out pairs, ties apart")
    return rows


def longest(row: PairIds) -> int:
    return len(row.prompt) + max(len(row.chosen), len(row.rejected))


# ---------------------------------------------------------------------------------------------
# review by programs; data/label.py is the review by people

class Review(NamedTuple):
    pairs: Subset
    rows: Subset               # PairIds of the pairs, in the same order
    dropped: dict[str, int]    # reason -> how many


def review(pairs, tokenizer: Tokenizer, max_len: int, check_format: bool = False) -> Review:
    """Drop the pairs from which nothing should be learned, and count why.

    The report's pairs are reviewed automatically (section 4.2); it does not disclose how, so the
    reasons are our choice. check_format drops chosen answers that are ill-formed or hold a false
    equation."""
    rows = TokenizedPairs(pairs, tokenizer)
    kept = array("q")          # places of the pairs
    dropped = Counter()
    seen = set()
    for i, row in enumerate(rows):
        chosen = tokenizer.decode(row.chosen[:-1])
        answers = frozenset((tuple(row.chosen), tuple(row.rejected)))  # also of the opposite pair
        both = hash((tuple(row.prompt), answers))  # 8 bytes, where the ids would take thousands
        if longest(row) > max_len:
            reason = "too long"
        elif not chosen.strip():
            reason = "empty chosen answer"
        elif row.chosen == row.rejected:
            reason = "equal answers"
        elif both in seen:
            reason = "seen before, or its opposite"
        elif check_format and is_torn(chosen):
            reason = "ill-formed chosen answer"
        elif check_format and not steps_hold(chosen):
            reason = "false equation or open box in the chosen answer"
        else:
            reason = ""
            kept.append(i)
            seen.add(both)
        if reason:
            dropped[reason] += 1
    return Review(Subset(pairs, kept), Subset(rows, kept), dict(dropped))


def is_torn(text: str) -> bool:
    """Does it end inside a character or inside a code block?"""
    return "\ufffd" in text or text.count("```") % 2 == 1
