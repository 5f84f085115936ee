"""The built-in queries: generators of mathematics, logic, code and instructions.

The report's post-training covers these four areas among others (section 4.1). The generators are
our choice: they make problems that a model of a million parameters can learn in five minutes and
often gets wrong, so that the whole pipeline runs without a download. Published numbers depend on
them: another draw, or another order of draws, changes every query.
"""
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from textwrap import indent
from typing import NamedTuple

NAMES = "Ann Ben Carla David Emma Hugo Kate Liam Maria Paul Rosa Sam".split()
ITEMS = "apples books cards coins eggs pens shells stamps".split()


class Problem(NamedTuple):
    """A question of mathematics or logic."""
    prompt: str
    answer: int | str
    steps: list[str]  # of the work that leads to the answer


class Task(NamedTuple):
    """What every generator returns."""
    prompt: str | list[dict]  # or messages
    check: dict            # of a query, see tasks/queries.py
    responses: list[str]   # right ones; where there are two, the second shows its work


def answer_task(problem: Problem) -> Task:
    """Return the task whose response must end in the problem's answer."""
    check = {"kind": "math", "answer": str(problem.answer)}
    direct = f"The answer is \\boxed{{{problem.answer}}}."
    worked = ". ".join([*problem.steps, direct])
    return Task(problem.prompt, check, [direct, worked])


# ---------------------------------------------------------------------------------------------
# mathematics: word problems of two steps with small numbers

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def word_problem(prompt: str, *steps: tuple[int, str, int]) -> Problem:
    """Return the problem of these steps, such as (3, "+", 4). The last one gives the answer."""
    texts = []
    for left, sign, right in steps:
        answer = OPERATIONS[sign](left, right)
        texts.append(f"{left} {sign} {right} = {answer}")
    return Problem(prompt, answer, texts)


def gain_and_loss(r: Random) -> Problem:
    name, other = r.sample(NAMES, 2)
    item = r.choice(ITEMS)
    had, gained = r.randint(2, 9), r.randint(2, 9)
    total = had + gained
    given = r.randint(1, min(9, total - 1))
    verb = r.choice(["buys", "finds", "gets"])
    return word_problem(
        f"{name} has {had} {item}. {name} {verb} {gained} more and gives {given} to {other}. "
        f"How many {item} does {name} have now?",
        (had, "+", gained), (total, "-", given))


def boxes(r: Random) -> Problem:
    name, item = r.choice(NAMES), r.choice(ITEMS)
    box = r.choice(["box", "bag", "basket", "jar"])
    size, count = r.randint(2, 6), r.randint(2, 6)
    left = r.randint(1, 9)
    plural = "boxes" if box == "box" else box + "s"
    return word_problem(
        f"Each {box} holds {size} {item}. {name} fills {count} {plural} and has {left} {item} "
        f"left. How many {item} are there in all?",
        (count, "*", size), (count * size, "+", left))


def together(r: Random) -> Problem:
    first, second = r.sample(NAMES, 2)
    item = r.choice(ITEMS)
    count, difference = r.randint(2, 9), r.randint(1, 9)
    word, sign = "fewer", "-"
    if count - difference < 1 or r.random() < 0.5:
        word, sign = "more", "+"
    other = OPERATIONS[sign](count, difference)
    return word_problem(
        f"{first} has {count} {item}. {second} has {difference} {word} than {first}. "
        f"How many {item} do they have together?",
        (count, sign, difference), (count, "+", other))


def change(r: Random) -> Problem:
    name = r.choice(NAMES)
    item = r.choice(ITEMS).removesuffix("s")
    price, count = r.randint(2, 6), r.randint(2, 6)
    cost = count * price
    paid = r.choice([note for note in (10, 20, 50) if note > cost])
    return word_problem(
        f"One {item} costs {price} dollars. {name} buys {count} of them and pays with {paid} "
        f"dollars. How many dollars does {name} get back?",
        (count, "*", price), (paid, "-", cost))


def share(r: Random) -> Problem:
    name, item = r.choice(NAMES), r.choice(ITEMS)
    friends, each = r.randint(2, 5), r.randint(2, 5)
    kept = r.randint(1, 9)
    shared = friends * each
    total = shared + kept
    return word_problem(
        f"{name} has {total} {item}, keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {item} does each friend get?",
        (total, "-", kept), (shared, "/", friends))


def perimeter(r: Random) -> Problem:
    place = r.choice(["garden", "room", "field", "yard"])
    length, width = r.randint(2, 9), r.randint(2, 9)
    return word_problem(
        f"A {place} is {length} metres long and {width} metres wide. "
        "What is its perimeter in metres?",
        (length, "+", width), (2, "*", length + width))


def mathematics(r: Random) -> Task:
    make = r.choice([gain_and_loss, boxes, together, change, share, perimeter])
    return answer_task(make(r))


# ---------------------------------------------------------------------------------------------
# logic

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = "baker singer doctor painter pilot teacher writer gardener runner farmer".split()
THINGS_TO_SWAP = "book ball key hat cup".split()
SYLLOGISMS = {  # answer: the second rule, the fact and the question, the reasoning
    "yes": ("Every {b} is a {c}.", "{name} is a {a}. Is {name} a {c}?",
            "{name} is a {a}, so a {b}, so a {c}"),
    "no": ("No {b} is a {c}.", "{name} is a {a}. Is {name} a {c}?",
           "{name} is a {a}, so a {b}, so not a {c}"),
    "unknown": ("Every {b} is a {c}.", "{name} is a {c}. Is {name} a {a}?",
                "A {c} need not be a {a}")}


def swap(r: Random) -> Problem:
    people = r.sample(NAMES, 3)
    has = dict(zip(people, r.sample(THINGS_TO_SWAP, 3), strict=True))
    facts = " ".join(f"{person} has the {thing}." for person, thing in has.items())
    a, b = r.sample(people, 2)
    has[a], has[b] = has[b], has[a]
    asked = r.choice(people)
    state = ", ".join(f"{person} {thing}" for person, thing in has.items())
    return Problem(f"{facts} {a} and {b} swap. What does {asked} have now?", has[asked], [state])


def weekday(r: Random) -> Problem:
    today = r.randrange(7)
    distance = r.randint(2, 5)
    step = 1
    question = f"what day is it in {distance} days"
    if r.random() < 0.5:
        step = -1
        question = f"what day was it {distance} days ago"
    days = [DAYS[(today + step * i) % 7] for i in range(distance + 1)]
    opening = r.choice(["Today is", "It is", "Suppose today is"])
    count = "Count: " + ", ".join(days)
    return Problem(f"{opening} {DAYS[today]}. So {question}?", days[-1], [count])


def syllogism(r: Random) -> Problem:
    """Draw two rules and a fact. If the fact is what the rules lead to, nothing follows from it:
    the answer is "unknown"."""
    name = r.choice(NAMES)
    a, b, c = r.sample(JOBS, 3)
    answer = r.choice(list(SYLLOGISMS))
    rule, question, step = SYLLOGISMS[answer]
    rules = ["Every {a} is a {b}.", rule]
    r.shuffle(rules)
    prompt = " ".join([*rules, question, "Answer yes, no or unknown."])
    values = {"name": name, "a": a, "b": b, "c": c}
    return Problem(prompt.format(**values), answer, [step.format(**values)])


def logic(r: Random) -> Task:
    make = r.choice([swap, weekday, syllogism])
    return answer_task(make(r))


# ---------------------------------------------------------------------------------------------
# code: a function to write, checked by running it

class Exercise(NamedTuple):
    """A function to write. The first solution is the reference that makes the hidden tests."""
    task: str             # completes "Write a Python function `f(x)` that"
    signature: str
    solutions: list[str]  # bodies of the function
    inputs: list          # arguments of the hidden tests

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]


LIST_FILTERS = {  # words for some numbers of a list: the condition on x
    "numbers": "",
    "even numbers": "x % 2 == 0", "odd numbers": "x % 2 == 1",
    "positive numbers": "x > 0", "negative numbers": "x < 0",
    "numbers greater than {k}": "x > {k}", "numbers less than {k}": "x < {k}",
    "numbers divisible by {k}": "x % {k} == 0"}
LIST_VALUES = {  # words for what is taken of each number: the expression of x
    "the": "x",
    "the squares of the": "x * x", "the doubles of the": "x * 2",
    "{m} times the": "x * {m}", "the absolute values of the": "abs(x)"}


def loop(start: str, over: str, condition: str, update: str, result: str) -> str:
    """Return the lines of a loop, with an `if` where there is a condition."""
    if condition:
        update = f"if {condition}:\n        {update}"
    return f"{start}\nfor {over}:\n    {update}\nreturn {result}"


def branch(condition: str, yes: str, no: str) -> str:
    return f"if {condition}:\n    return {yes}\nreturn {no}"


LIST_TASKS = {  # how: the task, its solution in one line; what starts, updates and ends the loop
    "sum": ("returns the sum of {values} {numbers} in xs", "return sum({value} {each})",
            "total = 0", "total += {value}", "total"),
    "count": ("returns how many {numbers} are in the list xs", "return sum(1 {each})",
              "n = 0", "n += 1", "n"),
    "list": ("returns a list of {values} {numbers} in xs", "return [{value} {each}]",
             "out = []", "out.append({value})", "out"),
    "largest": ("returns the largest of {values} {numbers} in xs, or 0 if there are none",
                "return max([{value} {each}], default=0)",
                "values = [{value} {each}]\nif not values:\n    return 0", "", "max(values)")}
# A task, its solution in one line, and its solution in several lines.
STRING_TASKS = [
    ("returns how many words in the string s have more than {k} letters",
     "return sum(1 for w in s.split() if len(w) > {k})",
     loop("n = 0", "w in s.split()", "len(w) > {k}", "n += 1", "n")),
    ("returns how often the letter {letter} is in the string s",
     "return s.count('{letter}')",
     loop("n = 0", "c in s", "c == '{letter}'", "n += 1", "n")),
    ("returns the string s reversed and in upper case",
     "return s[::-1].upper()",
     "s = s.upper()\nreturn s[::-1]"),
    ("returns the first {k} letters of the string s in upper case",
     "return s[:{k}].upper()",
     "start = s[:{k}]\nreturn start.upper()"),
    ("returns the string s without the letter {letter}",
     "return s.replace('{letter}', '')",
     loop("out = ''", "c in s", "c != '{letter}'", "out += c", "out")),
    ("returns the words of the string s that start with the letter {letter}",
     "return [w for w in s.split() if w.startswith('{letter}')]",
     loop("out = []", "w in s.split()", "w.startswith('{letter}')", "out.append(w)", "out")),
    ("returns the string s repeated {k} times", "return s * {k}", "return s * {k}"),
    ("returns the last {k} letters of the string s", "return s[-{k}:]", "return s[-{k}:]")]
NUMBER_TASKS = [
    ("returns True if n is divisible by {a} and not by {b}, else False",
     "return n % {a} == 0 and n % {b} != 0",
     branch("n % {a} == 0 and n % {b} != 0", "True", "False")),
    ("returns True if n is greater than {a} or divisible by {b}, else False",
     "return n > {a} or n % {b} == 0",
     branch("n > {a} or n % {b} == 0", "True", "False")),
    ("returns n times {a} plus {b}",
     "return n * {a} + {b}",
     "product = n * {a}\nreturn product + {b}"),
    ("returns {a} if n is even, else {b}",
     "return {a} if n % 2 == 0 else {b}",
     branch("n % 2 == 0", "{a}", "{b}")),
    ("returns n minus {a} if n is greater than {b}, else n times {c}",
     "return n - {a} if n > {b} else n * {c}",
     branch("n > {b}", "n - {a}", "n * {c}")),
    ("returns the sum of the numbers from 1 to n that are divisible by {a}",
     "return sum(i for i in range(1, n + 1) if i % {a} == 0)",
     loop("total = 0", "i in range(1, n + 1)", "i % {a} == 0", "total += i", "total"))]


def make_exercise(texts: Sequence[str], signature: str, inputs: list, **values) -> Exercise:
    """Return the exercise of a task and its two solutions, with the values put in."""
    task, *solutions = [text.format(**values) for text in texts]
    return Exercise(task, signature, [indent(body, "    ") for body in solutions], inputs)


def list_function(r: Random) -> Exercise:
    k = r.randint(2, 5)
    numbers, condition = r.choice(list(LIST_FILTERS.items()))
    m = r.randint(2, 5)
    values, value = r.choice(list(LIST_VALUES.items()))
    name = r.choice(["solve", "compute", "f", "process"])
    how = r.choice(list(LIST_TASKS))
    task, short, start, update, result = LIST_TASKS[how]
    long = f"{start}\nreturn {result}"
    if update:
        long = loop(start, "x in xs", condition, update, result)
    each = f"for x in xs if {condition}" if condition else "for x in xs"
    if how == "count" and not condition:
        short = "return len(xs)"
    words = {"numbers": numbers, "values": values, "value": value, "each": each, "k": k, "m": m}
    texts = [text.format(**words) for text in (task, short, long)]  # they may still hold {k}, {m}
    inputs = []
    for _ in range(4):
        length = r.randint(3, 7)
        inputs.append([r.randint(-9, 20) for _ in range(length)])
    inputs.append([])
    return make_exercise(texts, f"{name}(xs)", inputs, **words)


def string_function(r: Random) -> Exercise:
    k = r.randint(2, 5)
    letter = r.choice("aeiost")
    name = r.choice(["solve", "convert", "g", "handle"])
    texts = r.choice(STRING_TASKS)
    words = "the sea is at rest and a small stone sits on its edge tonight".split()
    inputs = [" ".join(r.sample(words, r.randint(2, 5))) for _ in range(4)]
    return make_exercise(texts, f"{name}(s)", inputs, k=k, letter=letter)


def number_function(r: Random) -> Exercise:
    a, b, c = r.sample(range(2, 10), 3)
    name = r.choice(["check", "solve", "f", "rule"])
    texts = r.choice(NUMBER_TASKS)
    inputs = r.sample(range(0, 40), 4) + [a * c]
    return make_exercise(texts, f"{name}(n)", inputs, a=a, b=b, c=c)


def examples(exercise: Exercise) -> list[tuple]:
    """Return each input with what the reference solution makes of it. That stands above, so it is
    executed here; the code of a model runs in the sandbox only."""
    namespace = {}
    exec(f"def {exercise.signature}:\n{exercise.solutions[0]}", namespace)
    function = namespace[exercise.name]
    return [(given, function(given)) for given in exercise.inputs]


def code(r: Random) -> Task:
    make = r.choice([list_function, list_function, string_function, number_function])
    exercise = make(r)
    tests = [f"assert {exercise.name}({given!r}) == {output!r}"
             for given, output in examples(exercise)]
    check = {"kind": "code", "language": "python", "tests": "\n".join(tests)}
    solution = r.choice(exercise.solutions)
    return Task(f"Write a Python function `{exercise.signature}` that {exercise.task}.", check,
                [f"```python\ndef {exercise.signature}:\n{solution}\n```"])


# ---------------------------------------------------------------------------------------------
# instruction following: constraints that a program checks, on a text of one sentence. They have
# IFEval's names where IFEval has them, but are stricter: a word must be a whole word. IFEval's own
# 25 kinds, which no model of a million parameters follows, are in tasks/ifeval.py.

THINGS = {  # noun: (adjectives, what it does)
    "sea": ("blue deep wide calm", "moves in the wind|sings at night|meets the sky|hides ships"),
    "river": ("long cold clear slow", "runs to the sea|turns in the valley|carries small boats"),
    "cat": ("small black quiet old", "sleeps by the fire|waits at the door|watches the birds"),
    "dog": ("big brown happy young", "runs in the park|barks at the moon|guards the house"),
    "garden": ("green small lovely wild", "smells of roses|needs some rain|wakes in spring"),
    "city": ("large noisy bright old", "never sleeps at night|grows every year|shines after rain"),
    "forest": ("dark quiet green old", "hides many animals|smells of rain|covers the hill"),
    "moon": ("pale bright full cold", "shines on the lake|rises over the hill|lights the road"),
    "train": ("fast late long red", "leaves the station|crosses the bridge|stops at noon"),
    "teacher": ("kind young strict wise", "reads a story|opens the window|helps the children"),
    "bird": ("little yellow free loud", "sings in the tree|flies over the river|builds a nest"),
    "winter": ("cold long white hard", "brings some snow|ends in March|makes the nights long")}
EXTRA = "slowly today again softly always often early together".split()
PLACES = ["in the morning", "near the old bridge", "after the storm", "on a summer day",
          "for a long time"]
CATEGORIES = {
    "animals": "cat dog horse cow sheep lion tiger bear wolf fox rabbit duck goat mouse".split(),
    "colours": "red blue green yellow black white brown pink orange purple grey".split(),
    "fruits": "apple pear plum cherry banana lemon orange grape peach melon".split(),
    "countries": "France Spain Italy Japan China India Brazil Canada Egypt Kenya Peru".split(),
    "sports": "tennis football rugby golf boxing hockey rowing running chess cricket".split()}


@dataclass
class Draft:
    """An instruction that constraints are added to, and a text that follows all of them."""
    prompt: str
    text: str
    rules: dict[str, dict]  # the arguments of each constraint

    def add(self, words: str, rule: str, **arguments) -> None:
        """Add a constraint; `words` say it in the prompt."""
        self.prompt += words
        self.rules[rule] = arguments


def list_draft(r: Random) -> Draft:
    """Return the instruction to list things of one category."""
    category = r.choice(list(CATEGORIES))
    n = r.randint(2, 6)
    things = r.sample(CATEGORIES[category], n)
    draft = Draft(f"List {n} {category}", ", ".join(things), {})
    draft.add("", "ours:items", category=category, n=n)
    if r.random() < 0.3:
        draft.text = "\n".join(f"* {thing}" for thing in things)
        draft.add(" as bullet points", "detectable_format:number_bullet_lists", num_bullets=n)
    else:
        draft.prompt += ", separated by commas"
    return draft


def sentence(r: Random, topic: str) -> list[str]:
    """Return the words of a sentence about the topic."""
    adjectives, actions = THINGS[topic]
    words = [r.choice(["The", "A", "Every", "One", "This"])]
    words += r.sample(adjectives.split(), r.randint(0, 2))
    words.append(topic)
    words += r.choice(actions.split("|")).split()
    if r.random() < 0.5:
        words += r.choice(PLACES).split()
    if r.random() < 0.4:
        words.append(r.choice(EXTRA))
    return words


def sentence_draft(r: Random) -> Draft:
    """Return the instruction to write a sentence about a topic, mostly with one more constraint."""
    topic = r.choice(list(THINGS))
    words = sentence(r, topic)
    keywords = [topic]
    draft = Draft(f"Write a sentence about the {topic}", " ".join(words) + ".", {})
    draft.add("", "keywords:existence", keywords=keywords)
    kind = r.choice(["words", "words", "keyword", "start", "end", "without", "plain"])
    if kind == "words":
        draft.add(f" with exactly {len(words)} words", "ours:exact_words", n=len(words))
    elif kind == "keyword":
        first, second = r.sample([word for word in words[1:] if word != topic], 2)
        keywords += [first, second]
        draft.prompt += f" with the words {first} and {second}"
    elif kind == "start":
        draft.add(f" that starts with the word {words[0]}", "ours:start_word", word=words[0])
    elif kind == "end":
        draft.add(f" that ends with the word {words[-1]}", "startend:end_checker",
                  end_phrase=words[-1] + ".")
    elif kind == "without":
        used = [word.lower() for word in words]
        unused = [word for word in ("the", "a", "in") if word not in used]
        word = r.choice(unused or ["and"])
        draft.add(f" without the word {word}", "keywords:forbidden_words", forbidden_words=[word])
    return draft


def instruction(r: Random) -> Task:
    """Return an instruction with one to three constraints."""
    draft = list_draft(r) if r.random() < 0.25 else sentence_draft(r)
    style = r.random()
    if style < 0.2:
        draft.text = draft.text.upper()
        draft.add(", in capital letters", "change_case:english_capital")
    elif style < 0.4:
        draft.text = draft.text.lower()
        draft.add(", in lower case", "change_case:english_lowercase")
    elif style < 0.5 and "\n" not in draft.text:
        draft.text = f'"{draft.text}"'
        draft.add(", in double quotes", "startend:quotation")
    check = {"kind": "rules", "instruction_id_list": list(draft.rules),
             "kwargs": list(draft.rules.values())}
    return Task(draft.prompt + ".", check, [draft.text])


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def lists_items(text: str, category: str, n: int) -> bool:
    """Return whether the text lists n different things of a category, by commas or by lines."""
    allowed = {thing.lower() for thing in CATEGORIES[category]}
    parts = [part.strip(" *-.") for part in re.split(r",|\n", text.strip('".').lower())]
    items = [part for part in parts if part]
    return len(items) == len(set(items)) == n and set(items) <= allowed


RULES = {  # rule: the check of a text, its words in small letters, and the rule's arguments
    "keywords:existence": lambda text, words, kw:
        all(word.lower() in words for word in kw["keywords"]),
    "keywords:forbidden_words": lambda text, words, kw:
        not any(word.lower() in words for word in kw["forbidden_words"]),
    "ours:exact_words": lambda text, words, kw: len(words) == kw["n"],
    "ours:start_word": lambda text, words, kw: words[:1] == [kw["word"].lower()],
    "startend:end_checker": lambda text, words, kw:
        text.strip('"').lower().endswith(kw["end_phrase"].lower()),
    "startend:quotation": lambda text, words, kw: len(text) > 1 and text[0] == text[-1] == '"',
    "change_case:english_capital": lambda text, words, kw: text.isupper(),
    "change_case:english_lowercase": lambda text, words, kw: text.islower(),
    "detectable_format:number_bullet_lists": lambda text, words, kw:
        len(re.findall(r"^[^\S\n]*[*-]\s+\S", text, re.M)) == kw["num_bullets"],
    "ours:items": lambda text, words, kw: lists_items(text, kw["category"], kw["n"])}


def follows(response: str, rule: str, kw: dict) -> bool:
    """Return whether the response follows one constraint. An unknown rule is never followed."""
    words = [word.lower() for word in words_of(response)]
    return rule in RULES and RULES[rule](response.strip(), words, kw)
