"""Variants of the built-in tasks: other languages, a system prompt, a second turn.

Each is a source of its own, such as `--queries rl,javascript:rl` or `python -m tasks demonstrations
--also c++,system,turns`, so that the default queries stay what they are. The report's SFT data have
code in many languages, system prompts and several turns (section 4.1). These small stand-ins are
our choice.
"""
import json
import re
from random import Random
from textwrap import dedent, indent

from tasks import toy
from tasks.toy import Exercise, Task

# ---------------------------------------------------------------------------------------------
# other languages: the long Python solutions of tasks/toy.py, translated line by line

NAMES = {"javascript": "JavaScript", "c++": "C++"}
LINES = [  # a line of Python, of JavaScript, of C++
    (r"(\w+) = \[\]", r"let \1 = [];", r"std::vector<int> \1;"),
    (r"(\w+) = (.+)", r"let \1 = \2;", r"int \1 = \2;"),
    (r"(\w+)\.append\((.+)\)", r"\1.push(\2);", r"\1.push_back(\2);"),
    (r"for x in xs:", "for (let x of xs) {", "for (int x : xs) {"),
    (r"for i in range\(1, n \+ 1\):", "for (let i = 1; i <= n; i++) {",
     "for (int i = 1; i <= n; i++) {"),
    (r"if (.+):", r"if (\1) {", r"if (\1) {"),
    (r"(return .+|\w+ \+= .+)", r"\1;", r"\1;")]
COLUMNS = {"javascript": 1, "c++": 2}  # of LINES
WORDS = {" and ": " && ", " or ": " || ", "True": "true", "False": "false",
         "% 2 == 1": "% 2 != 0"}  # there, -3 % 2 is -1


def translate(body: str, language: str) -> str:
    """Return a Python body that toy.loop or toy.branch made in JavaScript or C++."""
    for word, new in WORDS.items():
        body = body.replace(word, new)
    body = body.replace("abs(", "Math.abs(" if language == "javascript" else "std::abs(")
    lines = []
    depth = 0
    for line in dedent(body).splitlines():
        statement = line.strip()
        while depth > (len(line) - len(statement)) // 4:
            depth -= 1
            lines.append("    " * depth + "}")
        row = next(row for row in LINES if re.fullmatch(row[0], statement))
        translated = re.sub(row[0], row[COLUMNS[language]], statement)
        lines.append("    " * depth + translated)
        depth += translated.endswith("{")
    return indent("\n".join(lines), "    ")


def literal(value, language: str) -> str:
    text = json.dumps(value)
    if language == "c++":
        text = text.replace("[", "std::vector<int>{").replace("]", "}")
    return text


def cpp_signature(signature: str, given, returned) -> str:
    """f(xs) -> int f(std::vector<int> xs), with the types of an argument and of its result."""
    types = {list: "std::vector<int>", int: "int", bool: "bool"}
    name, argument = re.fullmatch(r"(\w+)\((\w+)\)", signature).groups()
    return f"{types[type(returned)]} {name}({types[type(given)]} {argument})"


def translatable(r: Random) -> Exercise:
    """Draw an exercise on a list or a number whose solution is a loop or a choice. No function may
    be called process, which is an object of Node.js."""
    while True:
        exercise = r.choice([toy.list_function, toy.number_function])(r)
        if "max(" not in exercise.solutions[1] and exercise.name != "process":
            return exercise


def brace_code(r: Random, language: str) -> Task:
    """Return a function to write in JavaScript or C++. The Python solution makes the tests."""
    exercise = translatable(r)
    examples = toy.examples(exercise)
    tests = []
    for given, output in examples:
        call = f"{exercise.name}({literal(given, language)})"
        wanted = literal(output, language)
        if language == "javascript":
            tests.append(f"console.assert(JSON.stringify({call}) === JSON.stringify({wanted}));")
        else:
            tests.append(f"    assert(({call} == {wanted}));")
    if language == "javascript":
        signature = exercise.signature
        head = f"function {signature}"
    else:
        signature = cpp_signature(exercise.signature, *examples[0])
        head = f"#include <cstdlib>\n#include <vector>\n\n{signature}"
        tests = ["int main() {", *tests, "}"]
    task = exercise.task.replace("True", "true").replace("False", "false")
    prompt = f"Write a {NAMES[language]} function `{signature}` that {task}."
    check = {"kind": "code", "language": language, "tests": "\n".join(tests)}
    body = translate(exercise.solutions[1], language)
    return Task(prompt, check, [f"```{language}\n{head} {{\n{body}\n}}\n```"])


# ---------------------------------------------------------------------------------------------
# conversations

OPENINGS = ["Sure", "Certainly", "Right", "Well"]
CLOSINGS = ["That is all.", "I hope this helps.", "Anything else?"]


def system(r: Random) -> Task:
    """Return a task whose system prompt sets how an answer begins or ends. The key "system_rule"
    of its check holds this rule and its arguments, for toy.follows."""
    task = r.choice([toy.mathematics, toy.logic, toy.code])(r)
    if r.random() < 0.5:
        word = r.choice(OPENINGS)
        said = f"Begin every answer with the word {word}."
        rule = ["ours:start_word", {"word": word}]
        responses = [f"{word}.\n{response}" for response in task.responses]
    else:
        phrase = r.choice(CLOSINGS)
        said = f"End every answer with: {phrase}"
        rule = ["startend:end_checker", {"end_phrase": phrase}]
        responses = [f"{response}\n{phrase}" for response in task.responses]
    prompt = [{"role": "system", "content": said}, {"role": "user", "content": task.prompt}]
    return Task(prompt, task.check | {"system_rule": rule}, responses)


def turns(r: Random) -> Task:
    """Return a task of two turns: the second question is about the first one's answer."""
    first = toy.mathematics(r)
    number = int(first.check["answer"])
    k = r.randint(2, 9)
    if r.random() < 0.5:
        problem = toy.word_problem(f"Add {k} to that.", (number, "+", k))
    else:
        problem = toy.word_problem(f"What is {k} times that?", (k, "*", number))
    second = toy.answer_task(problem)
    prompt = [{"role": "user", "content": first.prompt},
              {"role": "assistant", "content": r.choice(first.responses)},
              {"role": "user", "content": second.prompt}]
    return Task(prompt, second.check, second.responses)
