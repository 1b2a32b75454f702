"""The families of questions: one function each, weighed in ``FAMILIES``.

Every answer follows from its question alone (working spelled out, fixed wording), so a trained
target is nearly certain of each next token, and a draft has something to predict.
"""

import json
from collections.abc import Callable
from random import Random

from examples.tiny_target.words import (
    CAPITALS,
    COLOURS,
    CONDITIONS,
    DAYS,
    FINDS,
    GOODS,
    HEROES,
    JOBS,
    MOODS,
    NAMES,
    OPPOSITES,
    TERMS,
    TOOLS,
    UNITS,
)

Exchange = tuple[str, str]
"""A question and its answer."""


def addition(rng: Random) -> Exchange:
    """Two numbers below 100, added digit by digit with the carry spelled out."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    phrasings = f"What is {a} + {b}?", f"Please add {a} and {b}.", f"How much is {a} plus {b}?"
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    carried = f"write {ones % 10} and carry 1" if carry else "nothing to carry"
    answer = (
        f"Add the ones: {a % 10} + {b % 10} = {ones}, {carried}. "
        f"Add the tens: {a // 10} + {b // 10}{' + 1' if carry else ''} = "
        f"{a // 10 + b // 10 + carry}. The answer is {a + b}."
    )
    return rng.choice(phrasings), answer


def subtraction(rng: Random) -> Exchange:
    """A smaller number below 100 taken from a larger one, with the borrowing spelled out."""
    b, a = sorted((rng.randint(2, 99), rng.randint(2, 99)))
    phrasings = (
        f"What is {a} - {b}?",
        f"Please subtract {b} from {a}.",
        f"How much is {a} minus {b}?",
    )
    borrow = a % 10 < b % 10
    ones = a % 10 + 10 * borrow
    answer = (
        f"Subtract the ones: {ones} - {b % 10} = {ones - b % 10}, "
        f"{'borrow 1' if borrow else 'nothing to borrow'}. "
        f"Subtract the tens: {a // 10} - {b // 10}{' - 1' if borrow else ''} = "
        f"{a // 10 - b // 10 - borrow}. The answer is {a - b}."
    )
    return rng.choice(phrasings), answer


def multiplication(rng: Random) -> Exchange:
    """The multiplication table up to twelve."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    phrasings = (
        f"What is {a} times {b}?",
        f"Please multiply {a} by {b}.",
        f"How much is {a} * {b}?",
        f"I need the product of {a} and {b}.",
    )
    answer = f"Multiplying {a} by {b} means taking {a} exactly {b} times. So {a} * {b} = {a * b}."
    return rng.choice(phrasings), answer


def conversion(rng: Random) -> Exchange:
    """A number of larger units in smaller ones."""
    (large, small, factor), n = rng.choice(UNITS), rng.randint(2, 12)
    phrasings = (
        f"How many {small}s are in {n} {large}s?",
        f"Convert {n} {large}s to {small}s.",
        f"I have {n} {large}s. How many {small}s is that?",
    )
    answer = (
        f"One {large} has {factor} {small}s. For {n} {large}s, multiply {n} by {factor}. "
        f"So {n} {large}s are {n * factor} {small}s."
    )
    return rng.choice(phrasings), answer


def price(rng: Random) -> Exchange:
    """One line of a price list, looked up and multiplied."""
    prices = {good: rng.randint(2, 9) for good in rng.sample(GOODS, rng.randint(3, 5))}
    good, n = rng.choice(list(prices)), rng.randint(2, 6)
    listed = ", ".join(f"{name} {coins}" for name, coins in prices.items())
    phrasings = (
        f"Here is a price list: {listed}. How much do {n} units of {good} cost?",
        f"Prices: {listed}. What do I pay for {n} units of {good}?",
    )
    answer = (
        f"One unit of {good} costs {prices[good]} coins. For {n} units we multiply {n} by "
        f"{prices[good]}, which gives {n * prices[good]}. So {n} units of {good} cost "
        f"{n * prices[good]} coins in total."
    )
    return rng.choice(phrasings), answer


def ownership(rng: Random) -> Exchange:
    """Who has what, read from a few sentences."""
    k = rng.randint(2, 4)
    owners, things, colours = rng.sample(NAMES, k), rng.sample(TOOLS, k), rng.sample(COLOURS, k)
    rows = list(zip(owners, (_with_article(c) for c in colours), things, strict=True))
    facts = " ".join(f"{owner} has {colour} {thing}." for owner, colour, thing in rows)
    owner, colour, thing = rng.choice(rows)
    if rng.random() < 0.5:
        return f"{facts} Who has the {thing}?", (
            f"We look for the {thing}. The text says that {owner} has {colour} {thing}. "
            f"So the {thing} belongs to {owner}."
        )
    return f"{facts} What does {owner} have?", (
        f"We look for {owner}. The text says that {owner} has {colour} {thing}. "
        f"So {owner} has the {thing}."
    )


def story(rng: Random) -> Exchange:
    """A bedtime story from a small grammar."""
    mood, animal, find = rng.choice(list(MOODS)), rng.choice(list(HEROES)), rng.choice(list(FINDS))
    (home, character), (meaning, moral), (looks, deed) = HEROES[animal], MOODS[mood], FINDS[find]
    hero = f"{_with_article(mood)} {animal}"
    phrasings = (
        f"Tell me a story about {hero} and a {find}.",
        f"Write a short story with {hero} who finds a {find}.",
        f"I would like a bedtime story: {hero}, a {find}.",
    )
    answer = (
        f"Once upon a time there was {hero} who lived near the {home}. The {animal} {meaning}. "
        f"One morning the {character} {animal} found a {find} by the {home}. The {find} {looks}. "
        f"The {animal} took the {find} and {deed}. From that day on, everyone at the {home} was "
        f"glad to have such a {character} friend. The moral of the story: {moral}."
    )
    return rng.choice(phrasings), answer


def code(rng: Random) -> Exchange:
    """A small Python function."""
    goal = rng.choice(("sum", "count", "list"))
    kind, terms = rng.choice(list(CONDITIONS)), rng.choice(list(TERMS))
    wanted = f"{goal} of the {terms} of all {kind} numbers"
    phrasings = (
        f"Write a Python function for the {wanted}.",
        f"Python, please: the {wanted} in a list.",
        f"Show me Python code that returns the {wanted}.",
    )
    start, update = {
        "sum": ("0", f"result += {TERMS[terms]}"),
        "count": ("0", "result += 1"),
        "list": ("[]", f"result.append({TERMS[terms]})"),
    }[goal]
    name = f"{goal}_of_{kind}_{terms}"
    answer = (
        f"This function does it:\n\ndef {name}(numbers):\n    result = {start}\n"
        f"    for n in numbers:\n        if {CONDITIONS[kind]}:\n            {update}\n"
        f"    return result\n\nCall {name}([1, 2, 3]) to try it."
    )
    return rng.choice(phrasings), answer


def weekday(rng: Random) -> Exchange:
    """The day some days later, counted out."""
    first, n = rng.randrange(7), rng.randint(1, 12)
    name, days = DAYS[first], f"{n} day{'s' * (n > 1)}"
    phrasings = (
        f"Which day comes {days} after {name}?",
        f"Today is {name}. Which day is it in {days}?",
    )
    start = 7 * (n // 7)
    after_week = f"After 7 days it is {name} again. " if start else f"We start on {name}. "
    counted = "".join(
        f"Day {day} is {DAYS[(first + day) % 7]}. " for day in range(start + 1, n + 1)
    )
    return rng.choice(phrasings), f"{after_week}{counted}The answer is {DAYS[(first + n) % 7]}."


def counting(rng: Random) -> Exchange:
    """Counting in steps."""
    first, step, k = rng.randint(1, 40), rng.choice((1, 2, 3, 5, 10)), rng.randint(5, 9)
    numbers = [first + step * i for i in range(k)]
    phrasings = (
        f"Count from {first} to {numbers[-1]} in steps of {step}.",
        f"Please count in steps of {step}, from {first} to {numbers[-1]}.",
    )
    return rng.choice(phrasings), f"Here we go: {', '.join(map(str, numbers))}."


def to_json(rng: Random) -> Exchange:
    """A record written as JSON."""
    fields = rng.sample(list(_person(rng).items()), rng.randint(3, 4))
    listed = ", ".join(f"{key} = {value}" for key, value in fields)
    phrasings = (
        f"Turn this into JSON: {listed}",
        f"Please write this record as JSON: {listed}",
    )
    answer = (
        f"Here is the record as JSON:\n{json.dumps(dict(fields))}\nIt has {len(fields)} fields."
    )
    return rng.choice(phrasings), answer


def from_json(rng: Random) -> Exchange:
    """A JSON record told in sentences."""
    person = _person(rng)
    country = next(land for land, city in CAPITALS.items() if city == person["city"])
    phrasings = (
        f"Describe this person: {json.dumps(person)}",
        f"Write a few sentences about: {json.dumps(person)}",
    )
    name, job = person["name"], person["job"]
    answer = (
        f"{name} is {person['age']} years old and works as a {job}. {name} lives in "
        f"{person['city']}, the capital of {country}, and enjoys the life of a {job} there."
    )
    return rng.choice(phrasings), answer


def opposite(rng: Random) -> Exchange:
    """A word and its opposite, shown on a thing."""
    pair, thing = list(rng.choice(list(OPPOSITES.items()))), rng.choice(TOOLS)
    rng.shuffle(pair)
    word, other = pair
    phrasings = (
        f"What is the opposite of {word}? Show it with a {thing}.",
        f"Give me the opposite of the word {word}, with an example about a {thing}.",
        f"Which word is the opposite of {word}? Use a {thing} as an example.",
    )
    answer = (
        f"The opposite of {word} is {other}. For example: this {thing} is {word}, "
        f"but that {thing} is {other}."
    )
    return rng.choice(phrasings), answer


def ordering(rng: Random) -> Exchange:
    """A few numbers put in order."""
    numbers, rising = rng.sample(range(1, 60), rng.randint(3, 5)), rng.random() < 0.5
    way = "from smallest to largest" if rising else "from largest to smallest"
    listed = ", ".join(map(str, numbers))
    phrasings = f"Sort these numbers {way}: {listed}.", f"Put {listed} in order, {way}."
    in_order = ", ".join(map(str, sorted(numbers, reverse=not rising)))
    return rng.choice(phrasings), f"The numbers {way} are {in_order}."


def capital(rng: Random) -> Exchange:
    """A capital from its country, or the other way round."""
    (country, city), visitor = rng.choice(list(CAPITALS.items())), rng.choice(NAMES)
    if rng.random() < 0.5:
        return f"{visitor} asks: what is the capital of {country}?", (
            f"The capital of {country} is {city}. {visitor} can visit {city} by train or by plane."
        )
    return f"{visitor} is in {city}. Which country is that?", (
        f"{city} is the capital of {country}. So {visitor} is in {country}."
    )


FAMILIES: dict[Callable[[Random], Exchange], float] = {
    addition: 3,
    subtraction: 2,
    multiplication: 2,
    conversion: 2,
    price: 2.5,
    ownership: 3,
    story: 3,
    code: 3,
    weekday: 1.5,
    counting: 2,
    to_json: 2,
    from_json: 2,
    opposite: 1,
    ordering: 1.5,
    capital: 1,
}
"""How often each family is drawn, relative to the others."""


def _with_article(word: str) -> str:
    """``word`` after its indefinite article: ``an owl``."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _person(rng: Random) -> dict[str, str | int]:
    return {
        "name": rng.choice(NAMES),
        "age": rng.randint(18, 80),
        "city": rng.choice(list(CAPITALS.values())),
        "job": rng.choice(JOBS),
    }
