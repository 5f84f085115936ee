"""Conversations in the shapes that people have become messages, {"role", "content"} each.

    messages, tools = to_conversation({"instruction": "Add.", "input": "2 + 2", "output": "4"})

docs/your-data.md shows a line of every shape. What fits none of them is refused, and so is a column
that would change the meaning: nothing is left out in silence.
"""
import json

from lib.args import InputError, require

WANTED = 'expected {"messages": [{"role", "content"}, ...]} or another shape of docs/your-data.md'
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names -> ours


def to_conversation(row: dict) -> tuple[list[dict], list | None]:
    """Return the messages and the tools of a row. tokenizer.render checks the messages."""
    require(isinstance(row, dict), WANTED)
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list):
        messages = to_messages(turns)
    elif "instruction" in row and "output" in row and not row.get("history"):
        question = row["instruction"]
        require(isinstance(question, str), "instruction must be a string")
        if row.get("input"):
            question += f"\n{row['input']}"
        messages = to_messages(question) + to_messages(row["output"], "assistant")
    elif "prompt" in row and "completion" in row and "label" not in row:  # KTO labels bad answers
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
