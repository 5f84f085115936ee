"""Readers of the public benchmark files: GSM8K, SVAMP, MGSM, MATH, HumanEval, MBPP, IFEval.

A reader turns a row into a query {"prompt", "domain", "check"}. Where we add words to the question,
a fourth key "item" holds the question alone, so that contamination is measured on that. The words
are our choice.
"""
from lib.args import InputError, require
from lib.files import read_jsonl
from tasks import ifeval
from tasks.math_answers import last_box


def query(prompt: str, domain: str, **check) -> dict:
    prompt = prompt.strip()
    if not prompt or check.get("answer") == "":
        raise ValueError("the prompt or the answer is empty")
    return {"prompt": prompt, "domain": domain, "check": check}


def math_query(question: str, answer) -> dict:
    return query(question, "mathematics", kind="math", answer=str(answer).strip())


def gsm8k(row: dict) -> dict:
    return math_query(row["question"], row["answer"].split("####")[1])


def svamp(row: dict) -> dict:
    body = row["Body"].strip().rstrip(".")  # a third of the rows lack the full stop
    answer = row["Answer"]
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)  # the file has 145.0
    return math_query(f"{body}. {row['Question']}", answer)


def mgsm(row: dict) -> dict:
    question, blank = row["messages"]
    if question["role"] != "user" or blank["content"] != "":
        raise ValueError("messages must be one question and an empty answer")
    return math_query(question["content"], row["answer"])


def math(row: dict) -> dict:
    answer = row["answer"] if "answer" in row else last_box(row["solution"])
    return math_query(row["problem"], "" if answer is None else answer)


def humaneval(row: dict) -> dict:
    """The program is prefix + response + tests. A bare body continues the prefix; a whole function
    defines its name again. Both find the imports and helpers of the prompt there."""
    prompt = ("Complete the following Python function. Reply with the whole function in one "
              f"```python code block.\n\n```python\n{row['prompt'].strip()}\n```")
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return query(prompt, "code", kind="code", language="python", tests=tests,
                 prefix=row["prompt"]) | {"item": row["prompt"]}


def mbpp(row: dict) -> dict:
    """The prompt shows the first assert, because nothing else names the function."""
    text = row.get("text") or row["prompt"]
    asserts = row["test_list"]
    prompt = (f"{text}\nReply with one ```python code block. Your code should pass this test:\n\n"
              f"```python\n{asserts[0]}\n```")
    lines = row.get("test_imports", []) + [row.get("test_setup_code", "")] + asserts
    tests = "\n".join(line for line in lines if line) + "\n"
    return query(prompt, "code", kind="code", language="python", tests=tests) | {
        "item": f"{text}\n{asserts[0]}"}


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
    ("prompt", "test", "entry_point"): humaneval,
    ("text", "code", "test_list"): mbpp,
    ("prompt", "code", "test_list"): mbpp,  # the sanitized MBPP
    ("prompt", "instruction_id_list", "kwargs"): ifeval_row,
}
TEXTS = {"math": ["answer"], "code": ["language", "tests"], "ifeval": [], "rules": []}


def refuse_bad_check(query: dict) -> None:
    """Raise an error now for what could not be scored later, in training."""
    check = query["check"]
    kind = check["kind"]
    if kind not in TEXTS:
        raise ValueError(f"check.kind must be one of {', '.join(TEXTS)}")
    if not query["prompt"] or not isinstance(query["prompt"], (str, list)):
        raise TypeError("prompt must be a text or messages")
    texts = {"domain": query["domain"]} | {name: check[name] for name in TEXTS[kind]}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a text")
    if kind == "code":
        program = check.get("prefix", "") + check["tests"]
        program.encode()  # refuses half a surrogate pair, which no file can hold
    if kind == "ifeval":
        if not check["instruction_id_list"]:
            raise ValueError("no constraint: every response would earn 1.0")
        for rule, arguments in zip(check["instruction_id_list"], check["kwargs"], strict=True):
            ifeval.follows("text", rule, arguments)


def load_file(path) -> list[dict]:
    """Return the queries of a .jsonl or .jsonl.gz whose columns are among READERS."""
    queries = []
    for line, row in read_jsonl(path):
        here = f"{path}:{line}"
        readers = [read for columns, read in READERS.items() if row.keys() >= set(columns)]
        if not readers:
            known = "; ".join(", ".join(columns) for columns in READERS)
            raise InputError(f"{here}: unknown columns {', '.join(row)}; with --reward a row must "
                             f'have a "prompt", else all columns of one of {known}')
        try:
            queries.append(readers[0](row))
            refuse_bad_check(queries[-1])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{here}: cannot read this row of columns {', '.join(row)} "
                             f"({type(error).__name__}: {error})") from None
    require(len(queries) > 0, f"{path}: the file holds no rows")
    return queries
