"""The built-in queries: generators of mathematics, logic, code and instructions.

The report's post-training covers these four areas among others (section 4.1). The generators are
our choice: they make problems that a model of a million parameters can learn in five minutes and
often gets wrong, so that the whole pipeline runs without a download. Published numbers depend on
them: another draw, or another order of draws, changes every query.
"""
import re
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

def gain_and_loss(r: Random) -> Problem:
    name, other = r.sample(NAMES, 2)
    item = r.choice(ITEMS)
    had, gained = r.randint(2, 9), r.randint(2, 9)
    total = had + gained
    given = r.randint(1, min(9, total - 1))
    verb = r.choice(["buys", "finds", "gets"])
    return Problem(
        f"{name} has {had} {item}. {name} {verb} {gained} more and gives {given} to {other}. "
        f"How many {item} does {name} have now?",
        total - given,
        [f"{had} + {gained} = {total}", f"{total} - {given} = {total - given}"])


def boxes(r: Random) -> Problem:
    name, item = r.choice(NAMES), r.choice(ITEMS)
    box = r.choice(["box", "bag", "basket", "jar"])
    size, count = r.randint(2, 6), r.randint(2, 6)
    left = r.randint(1, 9)
    plural = "boxes" if box == "box" else box + "s"
    packed = count * size
    return Problem(
        f"Each {box} holds {size} {item}. {name} fills {count} {plural} and has {left} {item} "
        f"left. How many {item} are there in all?",
        packed + left,
        [f"{count} * {size} = {packed}", f"{packed} + {left} = {packed + left}"])


def together(r: Random) -> Problem:
    first, second = r.sample(NAMES, 2)
    item = r.choice(ITEMS)
    count, difference = r.randint(2, 9), r.randint(1, 9)
    if count - difference < 1 or r.random() < 0.5:
        word, other = "more", count + difference
        step = f"{count} + {difference} = {other}"
    else:
        word, other = "fewer", count - difference
        step = f"{count} - {difference} = {other}"
    return Problem(
        f"{first} has {count} {item}. {second} has {difference} {word} than {first}. "
        f"How many {item} do they have together?",
        count + other,
        [step, f"{count} + {other} = {count + other}"])


def change(r: Random) -> Problem:
    name = r.choice(NAMES)
    item = r.choice(ITEMS).removesuffix("s")
    price, count = r.randint(2, 6), r.randint(2, 6)
    cost = count * price
    paid = r.choice([note for note in (10, 20, 50) if note > cost])
    return Problem(
        f"One {item} costs {price} dollars. {name} buys {count} of them and pays with {paid} "
        f"dollars. How many dollars does {name} get back?",
        paid - cost,
        [f"{count} * {price} = {cost}", f"{paid} - {cost} = {paid - cost}"])


def share(r: Random) -> Problem:
    name, item = r.choice(NAMES), r.choice(ITEMS)
    friends, each = r.randint(2, 5), r.randint(2, 5)
    kept = r.randint(1, 9)
    shared = friends * each
    return Problem(
        f"{name} has {shared + kept} {item}, keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {item} does each friend get?",
        each,
        [f"{shared + kept} - {kept} = {shared}", f"{shared} / {friends} = {each}"])


def perimeter(r: Random) -> Problem:
    place = r.choice(["garden", "room", "field", "yard"])
    length, width = r.randint(2, 9), r.randint(2, 9)
    half = length + width
    return Problem(
        f"A {place} is {length} metres long and {width} metres wide. "
        "What is its perimeter in metres?",
        2 * half,
        [f"{length} + {width} = {half}", f"2 * {half} = {2 * half}"])


def mathematics(r: Random) -> Task:
    make = r.choice([gain_and_loss, boxes, together, change, share, perimeter])
    return answer_task(make(r))


# ---------------------------------------------------------------------------------------------
# logic

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = "baker singer doctor painter pilot teacher writer gardener runner farmer".split()
THINGS_TO_SWAP = "book ball key hat cup".split()


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
    answer = r.choice(["yes", "no", "unknown"])
    rules = [f"Every {a} is a {b}.", f"Every {b} is a {c}."]
    fact = f"{name} is a {a}."
    asked = c
    step = f"{name} is a {a}, so a {b}, so a {c}"
    if answer == "no":
        rules[1] = f"No {b} is a {c}."
        step = f"{name} is a {a}, so a {b}, so not a {c}"
    elif answer == "unknown":
        fact = f"{name} is a {c}."
        asked = a
        step = f"A {c} need not be a {a}"
    r.shuffle(rules)
    prompt = f"{' '.join(rules)} {fact} Is {name} a {asked}? Answer yes, no or unknown."
    return Problem(prompt, answer, [step])


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


def decision(words: str, condition: str) -> tuple[str, str, str]:
    task = f"returns True if n is {words}, else False"
    short = f"return {condition}"
    return task, short, branch(condition, "True", "False")


def either(words: str, condition: str, yes: str, no: str) -> tuple[str, str, str]:
    short = f"return {yes} if {condition} else {no}"
    long = branch(condition, yes, no)
    return words, short, long


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
    decision("divisible by {a} and not by {b}", "n % {a} == 0 and n % {b} != 0"),
    decision("greater than {a} or divisible by {b}", "n > {a} or n % {b} == 0"),
    ("returns n times {a} plus {b}",
     "return n * {a} + {b}",
     "product = n * {a}\nreturn product + {b}"),
    either("returns {a} if n is even, else {b}", "n % 2 == 0", "{a}", "{b}"),
    either("returns n minus {a} if n is greater than {b}, else n times {c}",
           "n > {b}", "n - {a}", "n * {c}"),
    ("returns the sum of the numbers from 1 to n that are divisible by {a}",
     "return sum(i for i in range(1, n + 1) if i % {a} == 0)",
     loop("total = 0", "i in range(1, n + 1)", "i % {a} == 0", "total += i", "total"))]


def make_exercise(texts: tuple[str, str, str], signature: str, inputs: list, **values) -> Exercise:
    """Return the exercise of a task and its two solutions, with the values put in."""
    task, *solutions = [text.format(**values) for text in texts]
    return Exercise(task, signature, [indent(body, "    ") for body in solutions], inputs)


def list_function(r: Random) -> Exercise:
    k = r.randint(2, 5)
    numbers, condition = r.choice(list(LIST_FILTERS.items()))
    m = r.randint(2, 5)
    values, value = r.choice(list(LIST_VALUES.items()))
    name = r.choice(["solve", "compute", "f", "process"])
    each = f"for x in xs if {condition}" if condition else "for x in xs"
    how = r.choice(["sum", "count", "list", "largest"])
    if how == "count":
        task = f"returns how many {numbers} are in the list xs"
        short = f"return sum(1 {each})" if condition else "return len(xs)"
        body = loop("n = 0", "x in xs", condition, "n += 1", "n")
    elif how == "sum":
        task = f"returns the sum of {values} {numbers} in xs"
        short = f"return sum({value} {each})"
        body = loop("total = 0", "x in xs", condition, f"total += {value}", "total")
    elif how == "list":
        task = f"returns a list of {values} {numbers} in xs"
        short = f"return [{value} {each}]"
        body = loop("out = []", "x in xs", condition, f"out.append({value})", "out")
    else:
        task = f"returns the largest of {values} {numbers} in xs, or 0 if there are none"
        short = f"return max([{value} {each}], default=0)"
        body = f"values = [{value} {each}]\n" + branch("not values", "0", "max(values)")
    inputs = []
    for _ in range(4):
        length = r.randint(3, 7)
        inputs.append([r.randint(-9, 20) for _ in range(length)])
    inputs.append([])
    return make_exercise((task, short, body), f"{name}(xs)", inputs, k=k, m=m)


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


def outputs(exercise: Exercise) -> list:
    """Return what the reference solution makes of the inputs. It stands above, so it is executed
    here; the code of a model runs in the sandbox only."""
    namespace = {}
    exec(f"def {exercise.signature}:\n{exercise.solutions[0]}", namespace)
    function = namespace[exercise.signature.partition("(")[0]]
    return [function(x) for x in exercise.inputs]


def code(r: Random) -> Task:
    make = r.choice([list_function, list_function, string_function, number_function])
    exercise = make(r)
    name = exercise.signature.partition("(")[0]
    tests = []
    for x, output in zip(exercise.inputs, outputs(exercise), strict=True):
        tests.append(f"assert {name}({x!r}) == {output!r}")
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
    names: list[str]
    arguments: list[dict]

    def add(self, words: str, name: str, **arguments) -> None:
        """Add a constraint; `words` say it in the prompt."""
        self.prompt += words
        self.names.append(name)
        self.arguments.append(arguments)


def list_draft(r: Random) -> Draft:
    """Return the instruction to list things of one category."""
    category = r.choice(list(CATEGORIES))
    n = r.randint(2, 6)
    things = r.sample(CATEGORIES[category], n)
    draft = Draft(f"List {n} {category}", ", ".join(things), [], [])
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
    draft = Draft(f"Write a sentence about the {topic}", " ".join(words) + ".", [], [])
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
    check = {"kind": "rules", "instruction_id_list": draft.names, "kwargs": draft.arguments}
    return Task(draft.prompt + ".", check, [draft.text])


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def follows(response: str, rule: str, kw: dict) -> bool:
    """Return whether the response follows one constraint. An unknown rule is never followed."""
    text = response.strip()
    words = [word.lower() for word in words_of(response)]
    if rule == "keywords:existence":
        return all(word.lower() in words for word in kw["keywords"])
    if rule == "keywords:forbidden_words":
        return not any(word.lower() in words for word in kw["forbidden_words"])
    if rule == "ours:exact_words":
        return len(words) == kw["n"]
    if rule == "ours:start_word":
        return words[:1] == [kw["word"].lower()]
    if rule == "startend:end_checker":
        return text.strip('"').lower().endswith(kw["end_phrase"].lower())
    if rule == "startend:quotation":
        return len(text) > 1 and text[0] == text[-1] == '"'
    if rule == "change_case:english_capital":
        return text.isupper()
    if rule == "change_case:english_lowercase":
        return text.islower()
    if rule == "detectable_format:number_bullet_lists":
        return len(re.findall(r"^\s*[*-]\s+\S", text, re.M)) == kw["num_bullets"]
    if rule == "ours:items":  # n different things of a category, by commas or by lines
        allowed = {thing.lower() for thing in CATEGORIES[kw["category"]]}
        parts = re.split(r",|\n", text.strip('".').lower())
        items = [part.strip(" *-.") for part in parts if part.strip(" *-.")]
        return len(items) == len(set(items)) == kw["n"] and set(items) <= allowed
    return False
