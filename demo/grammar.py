"""A small template grammar: seeded choice, named slots, verb forms, plurals and articles.

A template is a string with three kinds of marks:

* ``[one|two|three]`` picks one alternative (they may be nested);
* ``{symbol}`` expands a rule, ``{name=symbol}`` also remembers the result as ``{name}``, ``{form:symbol}`` changes its
  form (``past``, ``base``, ``third``, ``ing``, ``pl``), and ``{3-20}`` is a whole number in that range;
* ``%verb`` is a verb waiting for its form, ``a@`` the article ``a`` or ``an``.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence

IRREGULAR_PAST = {
    "bring": "brought", "buy": "bought", "sell": "sold", "find": "found", "lose": "lost", "hide": "hid",
    "draw": "drew", "break": "broke", "sweep": "swept", "build": "built", "lend": "lent", "eat": "ate", "cut": "cut",
    "drink": "drank", "feed": "fed", "catch": "caught", "grow": "grew", "leave": "left", "run": "ran", "drive": "drove",
    "ride": "rode", "swim": "swam", "sit": "sat", "stand": "stood", "sleep": "slept", "sing": "sang", "meet": "met",
    "write": "wrote", "send": "sent", "read": "read", "teach": "taught", "wear": "wore", "sew": "sewed",
    "forget": "forgot", "think": "thought", "dream": "dreamed", "hear": "heard", "see": "saw", "throw": "threw",
    "win": "won", "fall": "fell", "take": "took", "hold": "held", "pay": "paid", "choose": "chose", "give": "gave",
    "keep": "kept", "spend": "spent", "show": "showed", "make": "made", "light": "lit", "hang": "hung", "go": "went",
    "do": "did", "have": "had", "bend": "bent",
}  # fmt: skip
DOUBLING = {"stop", "drop", "cut", "swim", "run", "sit", "win", "forget", "travel", "plan", "chat"}
IRREGULAR_PLURAL = {
    "deer": "deer", "fish": "fish", "goose": "geese", "mouse": "mice", "ox": "oxen", "salmon": "salmon",
    "sheep": "sheep", "trout": "trout", "wolf": "wolves", "calf": "calves", "knife": "knives", "shelf": "shelves",
    "loaf": "loaves", "tooth": "teeth", "foot": "feet", "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes",
    "bamboo": "bamboo", "heather": "heather", "ivy": "ivy", "fisherman": "fishermen", "postman": "postmen",
}  # fmt: skip

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_SYMBOL = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")
_VERB = re.compile(r"%([a-z]+)")
_ARTICLE = re.compile(r"\b([Aa])@ (['\"]?)(\w+)")
_SENTENCE_START = re.compile(r"(^['\"]?|[.!?] ['\"]?|\n['\"]?)([a-z])")


def past(verb: str) -> str:
    """Past tense of a verb in its base form."""
    if verb in IRREGULAR_PAST:
        return IRREGULAR_PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in DOUBLING else "") + "ed"


def third(verb: str) -> str:
    """Third person singular of the present tense."""
    if verb == "have":
        return "has"
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def ing(verb: str) -> str:
    """The -ing form."""
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + (verb[-1] if verb in DOUBLING else "") + "ing"


def plural(noun: str) -> str:
    """Plural of a noun; only the last word of a compound changes."""
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURAL:
        last = IRREGULAR_PLURAL[last]
    elif last.endswith(("s", "sh", "ch", "x", "z")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}" if head else last


FORMS: dict[str, Callable[[str], str]] = {"base": str, "past": past, "third": third, "ing": ing}


def join_list(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _article(match: re.Match[str]) -> str:
    word = match[3].lower()
    vowel = word[0] in "aeiou" or word.startswith(("hour", "honest", "honour", "8")) or word in ("11", "18")
    vowel = vowel and not word.startswith(("uni", "use", "usu", "eu", "one"))
    return f"{match[1]}{'n' if vowel else ''} {match[2]}{match[3]}"


def finish(text: str) -> str:
    """Settle the articles and the capital letters of an expanded template."""
    text = _ARTICLE.sub(_article, text)
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


class Grammar:
    """Expands templates with one random stream; ``slots`` are the values remembered within one document."""

    def __init__(self, rules: Mapping[str, Sequence[str]], rng: random.Random) -> None:
        self.rules = rules
        self.rng = rng
        self.slots: dict[str, str] = {}

    def expand(self, template: str) -> str:
        """Expand every mark of the template except articles and capitals (see `finish`)."""
        while "[" in template:
            template = _ALTERNATIVES.sub(lambda match: self.rng.choice(match[1].split("|")), template)
        return _SYMBOL.sub(lambda match: self._symbol(match[1]), template)

    def text(self, template: str) -> str:
        """Expand a template to finished text."""
        return finish(self.expand(template))

    def some(self, symbol: str, count: int) -> list[str]:
        """``count`` different expansions of a rule, in random order."""
        return [self.expand(option) for option in self.rng.sample(list(self.rules[symbol]), count)]

    def _symbol(self, body: str) -> str:
        if body in self.slots:
            return self.slots[body]
        name, equals, symbol = body.partition("=")
        if equals:
            self.slots[name] = self._symbol(symbol)
            return self.slots[name]
        form, colon, symbol = body.partition(":")
        if colon:
            return self._form(form, self._symbol(symbol))
        numbers = _RANGE.fullmatch(body)
        if numbers:
            return str(self.rng.randint(int(numbers[1]), int(numbers[2])))
        return self.expand(self.rng.choice(self.rules[body]))

    def _form(self, form: str, phrase: str) -> str:
        if form == "pl":
            return plural(phrase)
        inflect = FORMS[form]
        return _VERB.sub(lambda match: inflect(match[1]), phrase)
