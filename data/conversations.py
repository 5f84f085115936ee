"""Conversations in the shapes that people have become messages, {"role", "content"} each.

    messages, tools = to_conversation({"instruction": "Add.", "input": "2 + 2", "output": "4"})

docs/your-data.md shows a line of every shape. What fits none of them is refused, and so are columns
that would change what may be learned: none of these is left out in silence. `Conversations` reads a
file of them as token ids with their loss mask.
"""
import json
from array import array
from itertools import islice
from typing import NamedTuple

from lib.args import InputError, require
from lib.dist import WORLD
from lib.files import JsonlFile, at_line

WANTED = 'expected {"messages": [{"role", "content"}, ...]} or another shape of docs/your-data.md'
REFUSED = ("history", "images", "rejected", "label", "kto_tag")  # KTO marks bad answers by false
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names -> ours


def to_conversation(row: dict) -> tuple[list[dict], list | None]:
    """Return the messages and the tools of a row. tokenizer.render checks the messages."""
    require(isinstance(row, dict), WANTED)
    for name in REFUSED:
        value = row.get(name)
        is_category = name == "label" and isinstance(value, str)
        require(is_category or value in (None, [], ""), f"{WANTED}, without columns such as {name}")
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list):
        messages = to_messages(turns)
    elif "instruction" in row and "output" in row:
        question, context = row["instruction"], row.get("input") or ""
        require(isinstance(question, str) and isinstance(context, str),
                "instruction and input must be strings")
        if context:
            question += f"\n{context}"
        messages = to_messages(question) + to_messages(row["output"], "assistant")
    elif "prompt" in row and "completion" in row:
        messages = to_messages(row["prompt"]) + to_messages(row["completion"], "assistant")
    else:
        raise InputError(f"{WANTED}, got the columns {', '.join(row)[:200]}")
    if row.get("system"):
        messages = to_messages(row["system"], "system") + messages
    return messages, row.get("tools")


def to_messages(turns, role: str = "user") -> list[dict]:
    """Return messages, given as ours, as ShareGPT's, as one of them, or as the text of one."""
    if isinstance(turns, str):
        turns = {"role": role, "content": turns}
    if isinstance(turns, dict):
        turns = [turns]
    require(isinstance(turns, list) and len(turns) > 0, WANTED)
    return [to_message(turn) for turn in turns]


def to_message(turn) -> dict:
    require(isinstance(turn, dict), WANTED)
    require(turn.get("weight", 1) == 1 and not turn.get("function_call"),
            "a message may have neither weight nor function_call: leave it out, use tool_calls")
    if "from" not in turn:
        message = {"role": turn.get("role"), "content": join_parts(turn.get("content"))}
        if "tool_calls" in turn:
            message["tool_calls"] = turn["tool_calls"]
        return message
    role = str(turn["from"])
    content = turn.get("value")
    if role != "function_call":
        return {"role": ROLES.get(role, role), "content": content}
    try:
        calls = json.loads(content)
    except (TypeError, ValueError):
        raise InputError("the value of a function_call must be JSON") from None
    if isinstance(calls, dict):
        calls = [calls]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def join_parts(content):
    """Return the text of [{"type": "text", "text": ...}, ...], and any other content as it is. A
    part without a type is a text."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            return content
    return "".join(part["text"] for part in content)


# ---------------------------------------------------------------------------------------------
# a file of conversations

class Row(NamedTuple):
    """A tokenized conversation."""
    ids: list[int]
    mask: list[int]                # loss mask m_t: 1 trained, 0 context (and -1 padding)


class PackedRow(NamedTuple):
    """Several conversations end to end, see `pack`."""
    ids: list[int]
    mask: list[int]
    segment_ids: list[int]         # number of the conversation that a token belongs to


class Conversations:
    """The conversations of a JSONL file, tokenized when they are asked for.

    Memory holds only where each begins. All are tokenized once at the start, so that a bad one is
    refused before training. A conversation that is cut before the assistant's first word has no
    target. It is dropped and counted, since a step without targets has no mean loss."""

    def __init__(self, path, tokenizer, max_len: int, n: int = 0):
        """n: how many to read; 0: all."""
        self.file = JsonlFile(path)
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.places = array("q")
        self.dropped = 0
        self.cut = 0           # conversations that lose targets by max_len
        self.targets = 0       # of all conversations, whole
        self.lost_targets = 0
        for number, place, row in islice(self.file.rows(), n or None):
            with at_line(path, number):
                mask = self.tokenize(row).mask
            lost = sum(mask[max_len:])
            self.cut += lost > 0
            self.lost_targets += lost
            self.targets += sum(mask)
            if any(mask[1:max_len]):  # the first token is never a target
                self.places.append(place)
            else:
                self.dropped += 1

    def tokenize(self, row: dict) -> Row:
        """Return a whole conversation, not yet cut."""
        messages, tools = to_conversation(row)
        ids, mask = self.tokenizer.render(messages, tools=tools)
        return Row(ids, mask)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Row:
        row = self.tokenize(self.file.read(self.places[i]))
        return Row(row.ids[:self.max_len], row.mask[:self.max_len])

    def prompts(self, n: int) -> list[dict]:
        """Return the messages before the assistant's first turn, of at most n conversations."""
        prompts = []
        for place in self.places[:n]:
            messages, tools = to_conversation(self.file.read(place))
            first_answer = [message["role"] for message in messages].index("assistant")
            prompt = messages[:first_answer]
            if prompt and len(self.tokenizer.render_prompt(prompt, tools)) <= self.max_len:
                prompts.append({"prompt": prompt} | ({"tools": tools} if tools else {}))
        return prompts


def pack(rows: list[Row], max_len: int) -> list[PackedRow]:
    """Pack conversations into fewer, longer rows (sequence packing).

    Longest first, each conversation goes into the first row with room for it. The loss does not
    change: attention and positions stay inside a conversation (segment_ids), and no conversation
    predicts the next one's first token, since the mask of <|im_start|> is 0."""
    packed = []
    longest_first = sorted(rows, key=lambda row: -len(row.ids))
    for number, conversation in enumerate(longest_first):
        room = max_len - len(conversation.ids)
        fitting = [row for row in packed if len(row.ids) <= room]
        if not fitting:
            fitting = [PackedRow([], [], [])]
            packed += fitting
        row = fitting[0]
        row.ids.extend(conversation.ids)
        row.mask.extend(conversation.mask)
        row.segment_ids.extend([number] * len(conversation.ids))
    while len(packed) % WORLD:  # rows without loss: all processes need equally many
        packed.append(PackedRow([0, 0], [-1, -1], [0, 0]))
    return packed
