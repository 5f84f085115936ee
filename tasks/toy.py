"""The built-in queries."""
import re


NAMES = "Ann Ben Carla David Emma Hugo Kate Liam Maria Paul Rosa Sam".split()
ITEMS = "apples books cards coins eggs pens shells stamps".split()


# ---------------------------------------------------------------------------------------------
# mathematics: two steps with small numbers: what a model of a million parameters can learn in five
# minutes, and often gets wrong. Each function -> (prompt, answer, steps)

def gain_and_loss(r):
    name, other, item = *r.sample(NAMES, 2), r.choice(ITEMS)
    a, b = r.randint(2, 9), r.randint(2, 9)
    c = r.randint(1, min(9, a + b - 1))
    verb = r.choice(["buys", "finds", "gets"])
    return (f"{name} has {a} {item}. {name} {verb} {b} more and gives {c} to {other}. "
            f"How many {item} does {name} have now?", a + b - c,
            [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"])


def boxes(r):
    name, item, box = r.choice(NAMES), r.choice(ITEMS), r.choice(["box", "bag", "basket", "jar"])
    n, k, c = r.randint(2, 6), r.randint(2, 6), r.randint(1, 9)
    plural = "boxes" if box == "box" else box + "s"
    return (f"Each {box} holds {n} {item}. {name} fills {k} {plural} and has {c} {item} left. "
            f"How many {item} are there in all?", n * k + c,
            [f"{k} * {n} = {n * k}", f"{n * k} + {c} = {n * k + c}"])


def together(r):
    (a_name, b_name), item = r.sample(NAMES, 2), r.choice(ITEMS)
    a, b = r.randint(2, 9), r.randint(1, 9)
    more = a - b < 1 or r.random() < 0.5
    x = a + b if more else a - b
    return (f"{a_name} has {a} {item}. {b_name} has {b} {'more' if more else 'fewer'} than "
            f"{a_name}. How many {item} do they have together?", a + x,
            [f"{a} {'+' if more else '-'} {b} = {x}", f"{a} + {x} = {a + x}"])


def change(r):
    name, item = r.choice(NAMES), r.choice(ITEMS)[:-1]
    p, k = r.randint(2, 6), r.randint(2, 6)
    m = r.choice([m for m in (10, 20, 50) if m > p * k])
    return (f"One {item} costs {p} dollars. {name} buys {k} of them and pays with {m} dollars. "
            f"How many dollars does {name} get back?", m - p * k,
            [f"{k} * {p} = {p * k}", f"{m} - {p * k} = {m - p * k}"])


def share(r):
    name, item = r.choice(NAMES), r.choice(ITEMS)
    k, g, c = r.randint(2, 5), r.randint(2, 5), r.randint(1, 9)
    return (f"{name} has {k * g + c} {item}, keeps {c} and shares the rest equally among {k} "
            f"friends. How many {item} does each friend get?", g,
            [f"{k * g + c} - {c} = {k * g}", f"{k * g} / {k} = {g}"])


def perimeter(r):
    place = r.choice(["garden", "room", "field", "yard"])
    a, b = r.randint(2, 9), r.randint(2, 9)
    return (f"A {place} is {a} metres long and {b} metres wide. What is its perimeter in metres?",
            2 * (a + b), [f"{a} + {b} = {a + b}", f"2 * {a + b} = {2 * (a + b)}"])


def mathematics(r):
    """-> (prompt, check, right responses): one states the answer at once, one shows its work."""
    prompt, answer, steps = r.choice(
        [gain_and_loss, boxes, together, change, share, perimeter])(r)
    return prompt, {"kind": "math", "answer": str(answer)}, direct_and_worked(steps, answer)


def direct_and_worked(steps: list[str], answer) -> list[str]:
    direct = f"The answer is \\boxed{{{answer}}}."
    return [direct, ". ".join([*steps, direct])]


# ---------------------------------------------------------------------------------------------
# logic. Each function -> (prompt, answer, steps)

def swap(r):
    people = r.sample(NAMES, 3)
    has = dict(zip(people, r.sample(["book", "ball", "key", "hat", "cup"], 3), strict=True))
    text = " ".join(f"{p} has the {t}." for p, t in has.items())
    a, b = r.sample(people, 2)
    has[a], has[b] = has[b], has[a]
    who = r.choice(people)
    return (f"{text} {a} and {b} swap. What does {who} have now?", has[who],
            [", ".join(f"{p} {t}" for p, t in has.items())])


def weekday(r):
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    i, n = r.randrange(7), r.randint(2, 5)
    back = r.random() < 0.5
    walk = [days[(i + (-k if back else k)) % 7] for k in range(n + 1)]
    ask = f"what day was it {n} days ago" if back else f"what day is it in {n} days"
    opening = r.choice(["Today is", "It is", "Suppose today is"])
    return f"{opening} {days[i]}. So {ask}?", walk[-1], ["Count: " + ", ".join(walk)]


def syllogism(r):
    name = r.choice(NAMES)
    a, b, c = r.sample(["baker", "singer", "doctor", "painter", "pilot", "teacher", "writer",
                        "gardener", "runner", "farmer"], 3)
    kind = r.choice(["yes", "no", "unknown"])
    second = f"No {b} is a {c}." if kind == "no" else f"Every {b} is a {c}."
    fact, ask = (f"{name} is a {c}.", a) if kind == "unknown" else (f"{name} is a {a}.", c)
    rules = [f"Every {a} is a {b}.", second]
    r.shuffle(rules)
    steps = {"yes": [f"{name} is a {a}, so a {b}, so a {c}"],
             "no": [f"{name} is a {a}, so a {b}, so not a {c}"],
             "unknown": [f"A {c} need not be a {a}"]}[kind]
    return (f"{' '.join(rules)} {fact} Is {name} a {ask}? Answer yes, no or unknown.", kind, steps)


def logic(r):
    """-> (prompt, check, right responses), as in mathematics."""
    prompt, answer, steps = r.choice([swap, weekday, syllogism])(r)
    return prompt, {"kind": "math", "answer": str(answer)}, direct_and_worked(steps, answer)


# ---------------------------------------------------------------------------------------------
# code: a function to write, checked by running it. Each function -> (prompt, signature, solutions,
# example inputs); the first solution is the reference that the hidden tests are made from.

def list_function(r):
    k = r.randint(2, 5)
    where, keep = r.choice([("", ""), ("even ", "x % 2 == 0"), ("odd ", "x % 2 == 1"),
                            ("positive ", "x > 0"), ("negative ", "x < 0"),
                            (f" greater than {k}", f"x > {k}"), (f" less than {k}", f"x < {k}"),
                            (f" divisible by {k}", f"x % {k} == 0")])
    m = r.randint(2, 5)
    phrase, value = r.choice([("", "x"), ("the squares of ", "x * x"), ("the doubles of ", "x * 2"),
                              (f"{m} times ", f"x * {m}"), ("the absolute values of ", "abs(x)")])
    numbers = f"numbers{where} in xs" if where.startswith(" ") else f"{where}numbers in xs"
    name, xs = r.choice(["solve", "compute", "f", "process"]), "for x in xs"
    test = f" if {keep}" if keep else ""
    body = f"        if {keep}:\n    " if keep else ""
    how = r.choice(["sum", "count", "list", "largest"])
    if how == "count":
        prompt = f"returns how many {numbers.replace(' in xs', '')} are in the list xs"
        one = f"sum(1 {xs}{test})" if keep else "len(xs)"
        loop = f"    n = 0\n    {xs}:\n{body}        n += 1\n    return n"
    elif how == "sum":
        prompt = f"returns the sum of {phrase or 'the '}{'the ' * bool(phrase)}{numbers}"
        one = f"sum({value} {xs}{test})"
        loop = f"    total = 0\n    {xs}:\n{body}        total += {value}\n    return total"
    elif how == "list":
        prompt = f"returns a list of {phrase or 'the '}{'the ' * bool(phrase)}{numbers}"
        one = f"[{value} {xs}{test}]"
        loop = f"    out = []\n    {xs}:\n{body}        out.append({value})\n    return out"
    else:
        prompt = f"returns the largest of {phrase or 'the '}{'the ' * bool(phrase)}{numbers}, " \
                 "or 0 if there are none"
        one = f"max([{value} {xs}{test}], default=0)"
        loop = (f"    values = [{value} {xs}{test}]\n    if not values:\n        return 0\n"
                "    return max(values)")
    inputs = [f"{[r.randint(-9, 20) for _ in range(r.randint(3, 7))]}" for _ in range(4)] + ["[]"]
    return prompt, f"{name}(xs)", [f"    return {one}", loop], inputs


def string_function(r):
    k, letter = r.randint(2, 5), r.choice("aeiost")
    name = r.choice(["solve", "convert", "g", "handle"])
    prompt, one, loop = r.choice([
        (f"returns how many words in the string s have more than {k} letters",
         f"sum(1 for w in s.split() if len(w) > {k})",
         f"    n = 0\n    for w in s.split():\n        if len(w) > {k}:\n            n += 1\n"
         "    return n"),
        (f"returns how often the letter {letter} is in the string s", f"s.count('{letter}')",
         f"    n = 0\n    for c in s:\n        if c == '{letter}':\n            n += 1\n"
         "    return n"),
        ("returns the string s reversed and in upper case", "s[::-1].upper()",
         "    s = s.upper()\n    return s[::-1]"),
        (f"returns the first {k} letters of the string s in upper case", f"s[:{k}].upper()",
         f"    start = s[:{k}]\n    return start.upper()"),
        (f"returns the string s without the letter {letter}", f"s.replace('{letter}', '')",
         f"    out = ''\n    for c in s:\n        if c != '{letter}':\n            out += c\n"
         "    return out"),
        (f"returns the words of the string s that start with the letter {letter}",
         f"[w for w in s.split() if w.startswith('{letter}')]",
         f"    out = []\n    for w in s.split():\n        if w.startswith('{letter}'):\n"
         "            out.append(w)\n    return out"),
        (f"returns the string s repeated {k} times", f"s * {k}", f"    return s * {k}"),
        (f"returns the last {k} letters of the string s", f"s[-{k}:]", f"    return s[-{k}:]")])
    words = "the sea is at rest and a small stone sits on its edge tonight".split()
    inputs = [repr(" ".join(r.sample(words, r.randint(2, 5)))) for _ in range(4)]
    return prompt, f"{name}(s)", [f"    return {one}", loop], inputs


def number_function(r):
    a, b, c = r.sample(range(2, 10), 3)
    name = r.choice(["check", "solve", "f", "rule"])
    prompt, one, loop = r.choice([
        (f"returns True if n is divisible by {a} and not by {b}, else False",
         f"n % {a} == 0 and n % {b} != 0",
         f"    if n % {a} == 0 and n % {b} != 0:\n        return True\n    return False"),
        (f"returns True if n is greater than {a} or divisible by {b}, else False",
         f"n > {a} or n % {b} == 0",
         f"    if n > {a} or n % {b} == 0:\n        return True\n    return False"),
        (f"returns n times {a} plus {b}", f"n * {a} + {b}",
         f"    product = n * {a}\n    return product + {b}"),
        (f"returns {a} if n is even, else {b}", f"{a} if n % 2 == 0 else {b}",
         f"    if n % 2 == 0:\n        return {a}\n    return {b}"),
        (f"returns n minus {a} if n is greater than {b}, else n times {c}",
         f"n - {a} if n > {b} else n * {c}",
         f"    if n > {b}:\n        return n - {a}\n    return n * {c}"),
        (f"returns the sum of the numbers from 1 to n that are divisible by {a}",
         f"sum(i for i in range(1, n + 1) if i % {a} == 0)",
         f"    total = 0\n    for i in range(1, n + 1):\n        if i % {a} == 0:\n"
         "            total += i\n    return total")])
    inputs = [str(n) for n in r.sample(range(0, 40), 4)] + [str(a * c)]
    return prompt, f"{name}(n)", [f"    return {one}", loop], inputs


def code(r):
    """-> (prompt, check, right responses): one, in one of two styles."""
    what, signature, bodies, inputs = r.choice(
        [list_function, list_function, string_function, number_function])(r)
    prompt = f"Write a Python function `{signature}` that {what}."
    name = signature.partition("(")[0]
    namespace = {}
    exec(f"def {signature}:\n{bodies[0]}", namespace)  # our own reference, not a model's output
    tests = "\n".join(f"assert {name}({x}) == {namespace[name](eval(x))!r}" for x in inputs)
    body = r.choice(bodies)
    return prompt, {"kind": "code", "language": "python", "tests": tests}, \
        [f"```python\ndef {signature}:\n{body}\n```"]


# ---------------------------------------------------------------------------------------------
# instruction following: constraints that a program checks, on a text of one sentence. Named as in
# IFEval where it has them, but stricter than there: words are whole words. IFEval's own 25 kinds,
# which no model of a million parameters follows, are in tasks/ifeval.py.

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
    "winter": ("cold long white hard", "brings some snow|ends in March|makes the nights long"),
}
EXTRA = "slowly today again softly always often early together".split()
PLACES = ["in the morning", "near the old bridge", "after the storm", "on a summer day",
          "for a long time"]
CATEGORIES = {
    "animals": "cat dog horse cow sheep lion tiger bear wolf fox rabbit duck goat mouse".split(),
    "colours": "red blue green yellow black white brown pink orange purple grey".split(),
    "fruits": "apple pear plum cherry banana lemon orange grape peach melon".split(),
    "countries": "France Spain Italy Japan China India Brazil Canada Egypt Kenya Peru".split(),
    "sports": "tennis football rugby golf boxing hockey rowing running chess cricket".split(),
}


def sentence(r, topic: str) -> list[str]:
    adjectives, does = THINGS[topic]
    words = [r.choice(["The", "A", "Every", "One", "This"])]
    words += r.sample(adjectives.split(), r.randint(0, 2)) + [topic]
    words += r.choice(does.split("|")).split()
    words += r.choice(PLACES).split() if r.random() < 0.5 else []
    words += [r.choice(EXTRA)] if r.random() < 0.4 else []
    return words


def instruction(r):
    """-> (prompt, check, right responses): one, to one or two constraints on a short text."""
    if r.random() < 0.25:
        kind, n = r.choice(list(CATEGORIES)), r.randint(2, 6)
        names = r.sample(CATEGORIES[kind], n)
        rules = [("ours:items", {"category": kind, "n": n})]
        prompt, text = f"List {n} {kind}, separated by commas", ", ".join(names)
        if r.random() < 0.3:
            prompt, text = prompt.replace(", separated by commas", " as bullet points"), \
                "\n".join(f"* {name}" for name in names)
            rules.append(("detectable_format:number_bullet_lists", {"num_bullets": n}))
    else:
        topic = r.choice(list(THINGS))
        words = sentence(r, topic)
        rules = [("keywords:existence", {"keywords": [topic]})]
        prompt = f"Write a sentence about the {topic}"
        kind = r.choice(["words", "words", "keyword", "start", "end", "without", "plain"])
        if kind == "words":
            prompt += f" with exactly {len(words)} words"
            rules.append(("ours:exact_words", {"n": len(words)}))
        elif kind == "keyword":
            used = r.sample([w for w in words[1:] if w != topic], 2)
            prompt += f" with the words {used[0]} and {used[1]}"
            rules[0][1]["keywords"] += used
        elif kind == "start":
            prompt += f" that starts with the word {words[0]}"
            rules.append(("ours:start_word", {"word": words[0]}))
        elif kind == "end":
            prompt += f" that ends with the word {words[-1]}"
            rules.append(("startend:end_checker", {"end_phrase": words[-1] + "."}))
        elif kind == "without":
            forbidden = r.choice([w for w in ("the", "a", "in") if w not in map(str.lower, words)]
                                 or ["and"])
            prompt += f" without the word {forbidden}"
            rules.append(("keywords:forbidden_words", {"forbidden_words": [forbidden]}))
        text = " ".join(words) + "."
    style = r.random()
    if style < 0.2:
        prompt, text = prompt + ", in capital letters", text.upper()
        rules.append(("change_case:english_capital", {}))
    elif style < 0.4:
        prompt, text = prompt + ", in lower case", text.lower()
        rules.append(("change_case:english_lowercase", {}))
    elif style < 0.5 and "\n" not in text:
        prompt, text = prompt + ", in double quotes", f'"{text}"'
        rules.append(("startend:quotation", {}))
    check = {"kind": "rules", "instruction_id_list": [i for i, _ in rules],
             "kwargs": [k for _, k in rules]}
    return prompt + ".", check, [text]


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def follows(response: str, rule: str, kw: dict) -> bool:
    """One constraint -> followed or not; an unknown rule is not followed."""
    text, words = response.strip(), [w.lower() for w in words_of(response)]
    if rule == "keywords:existence":
        return all(k.lower() in words for k in kw["keywords"])
    if rule == "keywords:forbidden_words":
        return not any(k.lower() in words for k in kw["forbidden_words"])
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
    if rule == "ours:items":
        allowed = {name.lower() for name in CATEGORIES[kw["category"]]}
        parts = re.split(r",|\n", text.strip('".').lower())
        items = [part.strip(" *-.") for part in parts if part.strip(" *-.")]
        return len(items) == len(set(items)) == kw["n"] and set(items) <= allowed
    return False
