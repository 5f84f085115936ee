"""Find the program in a model's answer: which of its fenced blocks of code are run.

1. Thinking is removed, because a draft inside <think> is no answer.
2. Candidates are the blocks in the query's language and the blocks that name no language.
3. For each name that the tests use, we take the last candidate that defines this name.
4. We join the candidates that define a function, class or import which these blocks use.

So an example of use, its output or a shell command never replaces the solution. If no block defines
such a name, we take the last candidate. An answer without blocks is run as it is.

Patterns read the answer instead of a parser, since a parser can crash this process, the trainer's.
Their repetitions are bounded, so that no answer takes them more than linear time.
"""
import functools
import re
from typing import NamedTuple

ALIASES = {"py": "python", "ipython": "python", "js": "javascript", "node": "javascript",
           "ts": "typescript", "cpp": "c++", "cc": "c++", "cxx": "c++", "sh": "bash",
           "shell": "bash", "rs": "rust", "golang": "go", "rb": "ruby", "pl": "perl"}
THINK = re.compile("<(/?)think(?:ing)?>")
FUTURE = re.compile(r"^from __future__ import (?:\([^)]{0,500}\)|[^\n(]*)\n?", re.M)
WORD = re.compile(r"\w+")

# Definitions at the start of a line: by a keyword, C's functions, values, imports.
KEYWORD = re.compile(
    r"^(?:<\?php )?(?:(?:export|default|pub|public|static|async|abstract|final|local)[ \t]+){0,3}"
    r"(?:def|class|function\*?|fn|func|sub|struct|enum|interface|trait|type|record)[ \t]+"
    r"(?:self\.)?(\w+)", re.M)
C_FUNCTION = re.compile(
    r"^(?!(?:if|for|while|switch|else|catch)\b)(?:[A-Za-z_][\w:<>,*&\[\] \t]{0,80}[ \t*&])?"
    r"([A-Za-z_]\w{0,80})[ \t]*\([^;{}]{0,200}\)[\w\s]{0,60}\{", re.M)
VALUE = re.compile(r"^(?:export[ \t]+)?(?:(?:const|let|var|local|my|auto)[ \t]+)?\$?([A-Za-z_]\w*)"
                   r"[ \t]*(?::[^=\n]{0,80})?=(?![=~>])", re.M)
STAR_IMPORT = re.compile(r"^from[ \t]+\S+[ \t]+import[ \t]*\*", re.M)
IMPORT = re.compile(r"^(?:from[ \t]+\S+[ \t]+)?import[ \t]+([^\n]+)", re.M)


class Fence(NamedTuple):
    indentation: int
    marks: str  # "```", or more of them, or "~~~"
    language: str  # "" if it names none
    lines: list[str]  # of its block


class Block(NamedTuple):
    language: str
    code: str


def opening_fence(line: str) -> Fence | None:
    """Return the fence that a line ends with, unless it closes a span of code on that line."""
    for mark in ("```", "~~~"):
        head, found, info = line.rpartition(mark)
        before = head.rstrip(mark[0])
        is_alone = not before.strip(" \t>0123456789.)-*+")  # or in a list or a quotation
        is_span = before.count(mark) % 2 == 1 or len(info.split()) > 1
        if found and (is_alone or not is_span):
            marks = line[len(before):len(line) - len(info)]
            name = re.match(r"[\s{.]*([\w+#-]*)", info)[1].lower().rstrip("0123456789")
            return Fence(len(before) if is_alone else 0, marks, ALIASES.get(name, name), [])
    return None


def closes(fence: Fence, line: str) -> bool:
    """Return whether a line closes the fence. Further to the right it would be in a docstring."""
    content = line.lstrip(" \t>")
    return content.startswith(fence.marks) and len(line) - len(content) <= fence.indentation + 3


def fenced_blocks(text: str) -> list[Block]:
    """Return all fenced blocks. The last one may lack its closing fence."""
    fences = []
    fence = None
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence is None or closes(fence, line):
            if fence:
                rest = line.lstrip(" \t>").lstrip(fence.marks[0])
                # "```python" inside a block opens the next one: its own fence was forgotten.
                line = line if rest[:1].isalnum() else rest
            fence = opening_fence(line)
            if fence:
                fences.append(fence)
            continue
        if not line[:fence.indentation].strip(" \t>"):
            line = line[fence.indentation:]
        code, marks, rest = line.partition(fence.marks)
        is_last = marks and code.strip() and not rest.strip()  # "return x```"
        fence.lines.append((code if is_last else line) + "\n")
        if is_last:
            fence = None
    return [Block(fence.language, "".join(fence.lines)) for fence in fences]


def functions(code: str) -> set[str]:
    """Return the functions and classes that a block defines."""
    return {*KEYWORD.findall(code), *C_FUNCTION.findall(code)}


def values(code: str) -> set[str]:
    """Return the names to which a block assigns values; `f = lambda x: x` is one."""
    return set(VALUE.findall(code))


def offers(code: str, asked: frozenset[str]) -> set[str]:
    """Return the names for which another block may need this one.

    The variables of an example of use are not among them: parameters often have the same names."""
    names = functions(code)
    for imported in IMPORT.findall(code):
        names.update(WORD.findall(imported))
    if asked.isdisjoint(WORD.findall(code)):  # it is no example
        names |= values(code)
    return names - {"as", "main"}


@functools.lru_cache(1024)  # the same tests judge every response to a query
def asked_names(tests: str) -> frozenset[str]:
    """Return the names that the tests use and do not define themselves."""
    flat = re.sub(r"^[ \t]+", "", tests, flags=re.M)
    return frozenset(WORD.findall(flat)) - functions(flat) - values(flat)


def join_blocks(blocks: list[str], asked: frozenset[str], definitions) -> str:
    """Return the last block that defines each asked name, with the blocks that these need.

    definitions: the function that lists the names which a block defines."""
    last = {}
    offered_by = {}
    for i, code in enumerate(blocks):
        last.update(dict.fromkeys(definitions(code) & asked, i))
        offered_by.update(dict.fromkeys(offers(code, asked), i))
    taken = set(last.values())
    for i, code in enumerate(blocks):  # `from math import *` offers names that we do not know
        if taken and STAR_IMPORT.search(code) and asked.isdisjoint(WORD.findall(code)):
            taken.add(i)
    queue = list(taken)
    while queue:
        code = blocks[queue.pop()]
        needed = set(WORD.findall(code)) - functions(code) - values(code) - last.keys()
        new = {offered_by[name] for name in needed & offered_by.keys()} - taken
        taken |= new
        queue += new
    return "\n".join(blocks[i] for i in sorted(taken))


def without_thinking(text: str) -> str:
    """Return what follows the last tag of thinking, or "" if the thinking has no end."""
    parts = THINK.split(text)  # behind each tag its "/" and the text that follows
    is_endless = len(parts) > 1 and parts[-2] == ""
    return "" if is_endless else parts[-1]


def extract_code(response: str, language: str = "python", tests: str = "", prefix: str = "") -> str:
    """Return the code of a response: its blocks by the rule above, or else the whole response."""
    text = without_thinking(response)
    asked = asked_names(tests)
    before, _, after = text.partition("\n```")
    begins_with_code = prefix and before[:1].isspace() or functions(before) & asked
    is_fenced = "```" in before or "~~~" in before
    if begins_with_code and not is_fenced and not after.partition("\n")[0].strip():
        text = "```\n" + text  # the prompt has opened the first block
    blocks = fenced_blocks(text)
    if not blocks:
        return text
    everything = [block.code for block in blocks]
    fitting = [block.code for block in blocks if block.language in ("", language)]
    bodies = [code for code in fitting if prefix and code[:1].isspace()]
    choices = [
        join_blocks(fitting, asked, functions), *bodies[-1:], join_blocks(fitting, asked, values),
        join_blocks(everything, asked, functions),  # the fence may name a wrong language
        text if functions(text) & asked else "",  # only a docstring of the code is fenced
        (fitting or everything)[-1]]
    return next(filter(None, choices), "")


def whole_program(response: str, check: dict) -> str:
    """Return the prefix and the code, after their `from __future__`, which must come first."""
    prefix = check.get("prefix", "")
    code = prefix + extract_code(response, check["language"], check["tests"], prefix)
    if check["language"] != "python":
        return code
    return "".join(FUTURE.findall(code)) + FUTURE.sub("", code)
