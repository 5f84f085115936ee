"""The public benchmark files."""
from tasks import ifeval
from lib.args import InputError
from lib.files import read_jsonl
from tasks.math_answers import last_box

# ---------------------------------------------------------------------------------------------
# 5. benchmark files -> queries {"prompt", "domain", "check"}
# and "item", the question without our own words, where the prompt has some (for data/ --evals)

def _query(prompt: str, domain: str, **check) -> dict:
    if not prompt.strip() or not check.get("answer", "-"):
        raise ValueError("the prompt or the answer is empty")
    return {"prompt": prompt.strip(), "domain": domain, "check": check}


def _math(question: str, answer) -> dict:
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)  # SVAMP writes 145.0
    return _query(question, "mathematics", kind="math", answer=str(answer).strip())


def _mgsm(row: dict) -> dict:
    question, blank = row["messages"]  # the second is an answer yet to come
    if (question["role"], blank["content"]) != ("user", ""):
        raise ValueError("want one question and an empty answer in messages")
    return _math(question["content"], row["answer"])


def _humaneval(row: dict) -> dict:
    """Run prefix + response + tests: a bare body continues the prefix, a whole function defines its
    name again, and both find the prompt's imports and helpers there."""
    prompt = ("Complete the following Python function. Reply with the whole function in one "
              f"```python code block.\n\n```python\n{row['prompt'].strip()}\n```")
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return _query(prompt, "code", kind="code", language="python", tests=tests,
                  prefix=row["prompt"]) | {"item": row["prompt"]}


def _mbpp(row: dict) -> dict:
    """The first assert is shown: nothing else names the function."""
    text, shown = row.get("text") or row["prompt"], row["test_list"][0]
    prompt = (f"{text}\nReply with one ```python code block. Your code "
              f"should pass this test:\n\n```python\n{shown}\n```")
    setup = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    tests = "\n".join([*filter(None, setup), *row["test_list"]]) + "\n"
    return _query(prompt, "code", kind="code", language="python", tests=tests) | {
        "item": f"{text}\n{shown}"}


def _ifeval(row: dict) -> dict:
    """The copy on the Hugging Face hub lists every argument, null where unused: dropped."""
    pairs = [*zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    kwargs = [{k: v for k, v in (one or {}).items() if v is not None} for _, one in pairs]
    return _query(row["prompt"], "instruction", kind="ifeval",
                  instruction_id_list=[name for name, _ in pairs], kwargs=kwargs)


FORMATS = {  # columns -> reader; the first whose columns are all there
    ("prompt", "domain", "check"): lambda row: row,
    ("question", "answer"): lambda row: _math(row["question"], row["answer"].split("####")[1]),
    ("Body", "Question", "Answer"): lambda row: _math(  # a third of SVAMP lacks this full stop
        f"{row['Body'].strip().rstrip('.')}. {row['Question']}", row["Answer"]),
    ("messages", "answer"): _mgsm,
    ("problem", "solution"): lambda row: _math(
        row["problem"], row["answer"] if "answer" in row else last_box(row["solution"]) or ""),
    ("prompt", "test", "entry_point"): _humaneval,
    ("text", "code", "test_list"): _mbpp,
    ("prompt", "code", "test_list"): _mbpp,  # the sanitized MBPP
    ("prompt", "instruction_id_list", "kwargs"): _ifeval,
}


FIELDS = {"math": ["answer"], "code": ["language", "tests"], "ifeval": [], "rules": []}


def load_file(path) -> list[dict]:
    """Queries of a .jsonl or .jsonl.gz in any of FORMATS, told apart by their columns."""
    queries = []
    for line, row in read_jsonl(path):
        read = next((read for columns, read in FORMATS.items() if row.keys() >= {*columns}), None)
        if not read:
            raise InputError(f"{path}:{line}: unknown columns {', '.join(row)}; with --reward "
                             'file.py:function of grpo.py and evaluate.py a "prompt" is enough, '
                             f"else want one of {'; '.join(map(', '.join, FORMATS))}")
        try:
            query = read(row)
            check = query["check"]
            if check["kind"] not in FIELDS:
                raise ValueError(f"check.kind is none of {', '.join(FIELDS)}")
            texts = {"domain": query["domain"]} | {name: check[name] for name in
                                                   FIELDS[check["kind"]]}
            if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
                raise TypeError(f"{wrong[0]} must be a text")
            if check["kind"] == "code":
                (check.get("prefix", "") + check["tests"]).encode()
            if not query["prompt"] or not isinstance(query["prompt"], (str, list)):
                raise TypeError("prompt must be a text or messages")
            queries.append(query)
            if check["kind"] == "ifeval":  # refuse now what it does not know, not while training
                for kind, kw in zip(check["instruction_id_list"], check["kwargs"], strict=True):
                    ifeval.follows("text", kind, kw)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}:{line}: cannot read this row of columns {', '.join(row)} "
                             f"({type(error).__name__}: {error})") from None
    if not queries:
        raise InputError(f"{path}: holds no rows")
    return queries
