"""What `Tokenizer.render` accepts: messages, tools, and the chat templates of model directories.

A chat template is a Jinja program. It is recognised, and never executed: for each that we know,
tokenizer.chat_segments writes the same text.
"""
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from lib.args import InputError, require

# ---------------------------------------------------------------------------------------------
# messages and tools

def check_messages(messages) -> None:
    """Raise an InputError that names the first message which cannot be rendered."""
    require(isinstance(messages, list) and len(messages) > 0,
            "messages must be a list with at least one message")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        require(role in ("system", "user", "assistant", "tool"),
                f"messages[{i}]: role must be system, user, assistant or tool, got {role!r}")
        content = message.get("content")
        calls = message.get("tool_calls") or []
        require(isinstance(calls, list), f"messages[{i}]: tool_calls must be a list")
        require(role == "assistant" or not calls, f"messages[{i}]: a {role} calls no tools")
        only_calls = role == "assistant" and content is None and len(calls) > 0
        require(isinstance(content, str) or only_calls,
                f"messages[{i}]: content must be a string, got {type(content).__name__}")
        for n, call in enumerate(calls):
            function = called_function(call)
            require(isinstance(function, dict) and {"name", "arguments"} <= function.keys()
                    and isinstance(function["name"], str),
                    f"messages[{i}]: tool_calls[{n}] must have a name and arguments")


def called_function(call):
    """Return {"name": …, "arguments": …}, which OpenAI's format wraps into {"function": …}."""
    return call.get("function", call) if isinstance(call, dict) else call


def from_json(value, what: str):
    """Return the value of a JSON text, which some APIs and data sets give, or any other value."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} not JSON ({error})") from None


def called_arguments(function: dict) -> dict:
    what = f"the arguments of {function['name']}"
    arguments = from_json(function["arguments"], f"{what} are")
    require(isinstance(arguments, dict), f"{what} must be an object")
    return arguments


def parse_tools(tools) -> list[dict]:
    tools = from_json(tools or [], "tools is") or []
    require(isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools),
            "tools must be a list of objects, or the JSON text of one")
    return tools


# ---------------------------------------------------------------------------------------------
# templates

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# What `save_pretrained` writes: the layout of tokenizer.chat_segments. A test renders with both.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text("utf-8").rstrip("\n")
BEFORE_SYSTEM, AFTER_SYSTEM = CHAT_TEMPLATE.split(json.dumps(DEFAULT_SYSTEM))


class ChatLayout(NamedTuple):
    """What tokenizer.chat_segments needs to know about a chat template."""
    default_system: str | None   # the system prompt of a chat without one
    has_tools: bool              # in the layout of CHAT_TEMPLATE


MAX_TEMPLATE = 5000  # characters; `canonical` takes quadratic time. Qwen2.5's: 2,507
# SHA-256 of `canonical` templates, with SYSTEM for the default system prompt.
LAYOUTS = {
    "be7b34286e436f3d": True,    # Qwen2.5, Qwen2.5-Math, QwQ-32B-Preview
    "832ca47832e862f4": False,   # Qwen2, Qwen2-MoE, SmolLM2
    "e53d9f11cfb1fe5b": False,   # plain ChatML, without a default system prompt
}


def template_with(system: str) -> str:
    """Return CHAT_TEMPLATE with another default system prompt. A JSON string is one in Jinja."""
    return BEFORE_SYSTEM + json.dumps(system, ensure_ascii=False) + AFTER_SYSTEM


def chat_layout(template) -> ChatLayout | None:
    """Return the layout of a chat template, None if it is none that we know."""
    if not isinstance(template, str):
        return None
    template = template.removesuffix("\n")  # as Jinja does
    try:
        if template.startswith(BEFORE_SYSTEM) and template.endswith(AFTER_SYSTEM):
            system = json.loads(template[len(BEFORE_SYSTEM):-len(AFTER_SYSTEM)])
            is_text = isinstance(system, str) and template == template_with(system)
            return ChatLayout(system, True) if is_text else None
        if len(template) > MAX_TEMPLATE:
            return None
        text = canonical(template)
        system = None
        literal = re.search(r"<\|im_start\|>system\\n([^']+)<\|im_end\|>\\n'", text)
        if literal:
            text = text.replace(literal[1], "SYSTEM")
            # Jinja's own rule for the escapes in a string
            system = literal[1].encode("ascii", "backslashreplace").decode("unicode-escape")
    except (ValueError, RecursionError):
        return None
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return ChatLayout(system, LAYOUTS[digest]) if digest in LAYOUTS else None


def check_layout(layout: ChatLayout | None, messages: list[dict], tools: list[dict]) -> None:
    """Refuse a conversation for which we do not know what the chat template would write."""
    require(layout is not None, "the chat template in tokenizer_config.json or chat_template.jinja "
            "is not one of Qwen2.5's, Qwen2's or plain ChatML; remove it to chat in Qwen2.5's "
            "layout")
    if not layout.has_tools:
        for message in messages:
            uses_tools = tools or message["role"] == "tool" or message.get("tool_calls")
            require(not uses_tools, "the model's chat template has no place for tools, their calls "
                    "and results")


def canonical(template: str) -> str:
    """Return a template without differences that change nothing: blanks around a tag with "-" and
    inside tags, x['y'] for x.y, 'a' + 'b' for 'ab', a line end in a string for \\n."""
    text = re.sub(r"\s*\{([{%])-", r"{\1", template)
    text = re.sub(r"-([%}])\}\s*", r"\1}", text)
    string_or_blank = r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\s+"""
    text = re.sub(r"(?s)\{[{%].*?[%}]\}", lambda tag: re.sub(string_or_blank, r"\1", tag[0]), text)
    text = re.sub(r"\[(['\"])(\w+)\1\]", r".\2", text.replace("\n", r"\n"))
    return text.replace("'+'", "")
