"""Readers of the public benchmark files: GSM8K, SVAMP, MGSM, MATH, HumanEval, MBPP, IFEval.

A reader turns a row into a query {"prompt", "domain", "check"}. Where we add words to the question,
a key "item" holds the question alone, so that contamination is measured on that. The words are our
choice. A key "solution" holds a right program, which must pass the tests (check_tests.py).
"""
import re
from collections.abc import Iterator

from data.conversations import join_parts
from lib.args import InputError, require
from lib.chat import parse_tools
from lib.files import read_jsonl
from tasks import ifeval, sandbox, toy
from tasks.math_answers import extract_answer


def query(prompt: str | list[dict], domain: str, **check) -> dict:
    if isinstance(prompt, str):
        prompt = prompt.strip()
    return {"prompt": prompt, "domain": domain, "check": check}


def math_query(question, answer) -> dict:
    return query(question, "mathematics", kind="math", answer=gold_text(answer))


def gold_text(answer) -> str:
    """Return an annotated answer as a text. A list of one answer stands for this answer."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)  # SVAMP has 145.0
    require(isinstance(answer, str | int | float) and not isinstance(answer, bool),
            f"the answer must be a text or a number, got {type(answer).__name__}")
    return str(answer).strip()


def final_answer(text) -> str:
    """Return the final answer of a worked solution, or a short text as it stands."""
    if not isinstance(text, str):
        return gold_text(text)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().partition("\n")[0]
    is_short = len(text) <= 100 and "\n" not in text
    if is_short and re.match(r"\s*A\s*:", text):
        return text  # as "B: 12" is; in a response "A:" stands for "Answer:"
    found = extract_answer(text, strict=True)
    require(found or is_short, "a long answer needs ####, or a box, before the final answer")
    return found or text


def gsm8k(row: dict) -> dict:
    return math_query(row["question"], final_answer(row["answer"]))


def svamp(row: dict) -> dict:
    body = row["Body"].strip().rstrip(".")  # a third of the rows lack the full stop
    return math_query(f"{body}. {row['Question']}", row["Answer"])


def mgsm(row: dict) -> dict:
    question, blank = row["messages"]
    require(question["role"] == "user" and blank["content"] == "",
            "messages must be one question and an empty answer")
    return math_query(question["content"], row["answer"])


def math(row: dict) -> dict:
    answer = row.get("answer")
    if answer is None:
        answer = extract_answer(row.get("solution", ""), strict=True)
    return math_query(row["problem"], answer)


def prompt_and_answer(row: dict) -> dict:
    return math_query(row["prompt"], final_answer(row["answer"]))


def verl(row: dict) -> dict:
    """The same rows hold code for other checkers, whose tests are no answer."""
    require("math" in str(row.get("ability")).lower(),
            'of verl\'s rows, only those of "ability": "math" can be read')
    return math_query(row["prompt"], row["reward_model"]["ground_truth"])


def humaneval(row: dict) -> dict:
    """The program is prefix + response + tests. A bare body continues the prefix; a whole function
    defines its name again. Both find the imports and helpers of the prompt there."""
    prompt = ("Complete the following Python function. Reply with the whole function in one "
              f"```python code block.\n\n```python\n{row['prompt'].strip()}\n```")
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return query(prompt, "code", kind="code", language="python", tests=tests,
                 prefix=row["prompt"]) | {"item": row["prompt"],
                                          "solution": row.get("canonical_solution")}


def mbpp(row: dict) -> dict:
    """The prompt shows the first assert, because nothing else names the function. MBPP+ has more
    tests in the column "test"."""
    text = row.get("text") or row["prompt"]
    asserts = row["test_list"]
    prompt = (f"{text}\nReply with one ```python code block. Your code should pass this test:\n\n"
              f"```python\n{asserts[0]}\n```")
    lines = row.get("test_imports", []) + [row.get("test_setup_code"), *asserts, row.get("test")]
    tests = "\n".join(line for line in lines if line) + "\n"
    return query(prompt, "code", kind="code", language="python", tests=tests) | {
        "item": f"{text}\n{asserts[0]}", "solution": row["code"]}


def ifeval_row(row: dict) -> dict:
    """The copy on the Hugging Face hub lists every argument, null where it is not used."""
    kwargs = []
    for arguments in row["kwargs"]:
        used = {name: value for name, value in (arguments or {}).items() if value is not None}
        kwargs.append(used)
    return query(row["prompt"], "instruction", kind="ifeval",
                 instruction_id_list=list(row["instruction_id_list"]), kwargs=kwargs)


READERS = {  # columns: the reader of a row that has all of them; the first that fits is taken
    ("prompt", "domain", "check"): dict,
    ("question", "answer"): gsm8k,
    ("Body", "Question", "Answer"): svamp,
    ("messages", "answer"): mgsm,
    ("problem", "solution"): math,
    ("problem", "answer"): math,
    ("prompt", "test", "entry_point"): humaneval,
    ("text", "code", "test_list"): mbpp,
    ("prompt", "code", "test_list"): mbpp,  # the sanitized MBPP, and MBPP+
    ("prompt", "instruction_id_list", "kwargs"): ifeval_row,
    ("prompt", "reward_model"): verl,
    ("prompt", "answer"): prompt_and_answer,
}
TEXTS = {"math": ["answer"], "code": ["language", "tests"], "ifeval": [], "rules": []}


def text_message(message: dict) -> dict:
    """Return a message whose content is a text, also where it was a list of parts."""
    content = join_parts(message["content"])
    has_text = isinstance(content, str) or content is None and message.get("tool_calls")
    require(has_text and isinstance(message["role"], str),
            f"each message must have a role and a text as its content, not {str(message)[:100]}")
    return message | {"content": content}


def contents(prompt: str | list[dict]) -> list[str]:
    """Return the texts of a prompt: the prompt itself, or what its messages say."""
    if isinstance(prompt, str):
        return [prompt]
    return [message["content"] or "" for message in prompt]


def require_texts(texts: dict) -> None:
    """Raise an error if one of the values is no text, or is empty."""
    for name, text in texts.items():
        require(isinstance(text, str), f"{name} must be a text, got {type(text).__name__}")
        require(text.strip(), f"the {name} must not be empty")


def clean_prompt(query: dict) -> None:
    """Make texts of the messages of a prompt; raise an error for a bad prompt or domain."""
    prompt = query["prompt"]
    require(isinstance(prompt, str | list),
            f"prompt must be a text or messages, got {type(prompt).__name__}")
    if isinstance(prompt, list):
        query["prompt"] = [text_message(message) for message in prompt]
    require_texts({"domain": query["domain"], "prompt": "".join(contents(query["prompt"]))})
    require(query["domain"] != "total", "no domain may be called total")


def refuse_bad_check(query: dict) -> None:
    """Raise an error now for what could not be scored later, in training."""
    check = query["check"]
    kind = check["kind"]
    require(kind in TEXTS, f"check.kind must be one of {', '.join(TEXTS)}")
    require_texts({name: check[name] for name in TEXTS[kind]})
    if "system_rule" in check:
        rule, arguments = check["system_rule"]
        refuse_bad_rule(rule, arguments)
    if kind == "code":
        program = check.get("prefix", "") + check["tests"]
        program += query.get("solution") or ""
        program.encode()  # refuses half a surrogate pair, which no file can hold
        lack = sandbox.languages().get(check["language"], "is unknown")
        require(not lack, f"a check in {check['language']}: {lack}")
    if kind in ("ifeval", "rules"):
        require(check["instruction_id_list"], "no constraint: every response would earn 1.0")
        for rule, arguments in zip(check["instruction_id_list"], check["kwargs"], strict=True):
            if kind == "ifeval":
                ifeval.follows("text", rule, arguments)
            else:
                refuse_bad_rule(rule, arguments)


def refuse_bad_rule(rule: str, arguments: dict) -> None:
    require(rule in toy.RULES, f"unknown rule {rule}")
    for name, value in arguments.items():
        ifeval.clean_argument(name, value)
    toy.follows("text", rule, arguments)


def read_queries(path) -> Iterator[tuple[int, dict]]:
    """Yield (line, query) of a file whose columns are among READERS, see `read_jsonl`."""
    line = 0
    for line, row in read_jsonl(path):
        here = f"{path}:{line}"
        readers = [read for columns, read in READERS.items() if row.keys() >= set(columns)]
        if not readers:
            known = "; ".join(", ".join(columns) for columns in READERS)
            raise InputError(f"{here}: unknown columns {', '.join(row)}; with --reward a row must "
                             f'have a "prompt", else all columns of one of {known}')
        try:
            query = readers[0](row)
            clean_prompt(query)
            if isinstance(query["prompt"], list):
                asked = [message for message in query["prompt"] if message["role"] == "user"]
                query.setdefault("item", "\n".join(contents(asked)))
            if parse_tools(row.get("tools")):
                query["tools"] = row["tools"]
            refuse_bad_check(query)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{here}: cannot read this row of columns {', '.join(row)}: "
                             f"{type(error).__name__}: {error}") from None
        yield line, query
    require(line > 0, f"{path}: the file holds no rows")


def load_file(path) -> list[dict]:
    """Return the queries of a file, see `read_queries`."""
    return [query for _, query in read_queries(path)]
