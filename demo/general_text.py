"""General English for pretraining: stories, letters, recipes, reports, advice, dialogues, instructions, cards.

The text is made by a grammar (`grammar.py`) over word lists (`words.py`) with one seeded random stream, so the same
seed gives the same text. There are no clinic notes in it. Many documents start with a few facts and go on with prose
that repeats them: that is what teaches so small a model to copy names and numbers, which fine-tuning then builds on.
"""

import random
from collections.abc import Callable, Iterator

import words
from grammar import Grammar, finish, join_list

RULES: dict[str, list[str]] = {
    "woman": words.WOMEN,
    "man": words.MEN,
    "surname": words.SURNAMES,
    "town": words.TOWNS,
    "job": words.JOBS,
    "relative": words.RELATIVES,
    "animal": words.ANIMALS,
    "pet": words.PETS,
    "pet_name": words.PET_NAMES,
    "food": words.FOODS,
    "vegetable": words.VEGETABLES,
    "meat": words.MEATS,
    "staple": words.STAPLES,
    "spice": words.SPICES,
    "baking": words.BAKING,
    "drink": words.DRINKS,
    "object": words.OBJECTS,
    "cloth": words.CLOTHES,
    "machine": words.MACHINES,
    "material": words.MATERIALS,
    "plant": words.PLANTS,
    "place": words.PLACES,
    "room": words.ROOMS,
    "landscape": words.LANDSCAPES,
    "vehicle": words.VEHICLES,
    "colour": words.COLOURS,
    "adj": words.ADJECTIVES,
    "trait": words.TRAITS,
    "feeling": words.FEELINGS,
    "adverb": words.ADVERBS,
    "time": words.TIMES,
    "month": words.MONTHS,
    "day": words.DAYS,
    "sky": words.SKIES,
    "direction": words.DIRECTIONS,
    "hobby": words.HOBBIES,
    "sport": words.SPORTS,
    "team": words.TEAMS,
    "subject": words.SUBJECTS,
    "abstract": words.ABSTRACTS,
    "body": words.BODY,
    "ailment": words.AILMENTS,
    "remedy": words.REMEDIES,
    "habit": words.HEALTHY_HABITS,
    "connector": words.CONNECTORS,
    "proverb": words.PROVERBS,
    "vp": words.VERB_PHRASES,
    "name": ["{woman}", "{man}"],
    "rel": ["{P} {relative}", "{P} {relative}", "the {job}", "{name}"],
    "a_object": ["a@ {adj} {object}", "a@ {object}", "a@ {object} of {material}", "a@ {colour} {object}"],
    "a_animal": ["a@ {animal}", "a@ {adj} {animal}", "two {pl:animal}"],
    "a_food": ["a@ {food}", "a@ {adj} {food}", "three {pl:food}"],
    "a_machine": ["a@ {machine}", "a@ {adj} {machine}"],
    "a_plant": ["a@ {plant}", "a@ {adj} {plant}"],
    "a_job": ["a@ {job}", "a@ {trait} {job}"],
    "a_adj": ["a@ {adj}"],
    "a_colour": ["a@ {colour}"],
    "pl_plant": ["{pl:plant}"],
    "pl_animal": ["{pl:animal}"],
    "pl_object": ["{pl:object}"],
    "n": ["{2-99}"],
    "meal": ["{meat} with {vegetable}", "{vegetable} soup", "{staple} with {vegetable}", "{food} and {food}", "dinner"],
    "greeting": ["hello", "good morning", "good evening", "good afternoon", "hi", "welcome"],
    "person_word": ["man", "woman", "boy", "girl", "child", "stranger", "traveller", "{job}", "{trait} {job}"],
    "speech_verb": ["said", "answered", "whispered", "replied", "called", "explained", "shouted", "asked softly"],
    "quality": [
        "{adj}",
        "very {adj}",
        "{adj} and {adj}",
        "rather {adj}",
        "{adj} but {adj}",
        "quite {adj}",
        "too {adj}",
        "less {adj} than before",
        "not {adj} at all",
        "as {adj} as a@ {object}",
    ],
    # Sentences about the main person of a document (N name, S he, O him, P his).
    "story_middle": [
        "{time}, {N} {past:vp}.",
        "{S} {past:vp} and {past:vp}.",
        "{connector}, {S} {past:vp}.",
        "{N} wanted to {base:vp}, but {S} had to {base:vp} first.",
        "{S} {past:vp} {adverb}.",
        "While {N} was {ing:vp}, {S} saw {a_animal} near the {place}.",
        "The {object} was {quality}.",
        "{S} felt {feeling} because {P} {object} was {adj}.",
        "{N} was {feeling}, so {S} {past:vp}.",
        "'I [want to|must|would like to|cannot|will not] {base:vp_mine},' {speech_verb} {N}.",
        "'Did you {base:vp_yours}?' asked {N2}.",
        "{N2} {past:vp2} before {S2} {past:vp2}.",
        "There was {a_object} in the {place}, and next to it lay {a_object}.",
        "The {place} was {quality}, and the {place} behind it was {quality}.",
        "It was {sky} {time}, and the wind came from the {direction}.",
        "{N} and {N2} {past:vp_they} together.",
        "If {N2} had not {past:help}, {N} would have been {feeling}.",
        "Nobody knew that {N2} was a@ {job}.",
        "{S} asked {N2} to {base:vp2}, and {N2} did so {adverb}.",
        "{N} had never seen {a_object} like that.",
        "It took {O} {n} minutes to {base:vp}.",
        "When {S} came back, the {object} was gone.",
        "{N2} gave {O} {a_object}, and {S} thanked {O2} {adverb}.",
        "The {animal} looked at {O} and {past:animal_act}.",
        "{S} could hear the {animal} that {past:animal_act}.",
        "As everybody knows, {proverb}.",
        "{S} liked the {colour} {object} more than the {colour} one.",
        "'What [a@ {adj} {object}|a@ {adj} {place}|a@ {adj} {animal}]!' {speech_verb} {N2}.",
    ],
    "animal_act": [
        "%jump over the {object}",
        "%run away",
        "%sleep under the {plant}",
        "%climb the {plant}",
        "%walk away {adverb}",
        "%drink from the {place}",
        "%look for food",
        "%hide behind the {plant}",
        "%play with the {object}",
    ],
    "help": ["%help", "%wait", "%call", "%arrive in time", "%listen"],
    "story_begin": [
        "Once upon a time there was a@ {trait} {job} called {N} "
        "who lived in a@ {adj} house near the {place} of {town}.",
        "{N} was a@ {trait} {job} from {town}. {S} liked {hobby} and {hobby}.",
        "{time}, {N} and {N2} met at the {place}. {N} was {feeling}, and {N2} was {feeling}.",
        "In {town} there lived a@ {person_word} whose name was {N}. Everybody said that {S} was {trait} and {trait}.",
        "{N} woke up {adverb}. It was {sky} outside, and {S} had to {base:vp}.",
        "Nobody in {town} knew why {N} always {past:vp} {time}.",
        "{N} had a@ {own=pet} called {pet_name}. {time}, the {own} ran into the {place}.",
    ],
    "story_end": [
        "{N} never forgot that day.",
        "From then on, {N} and {N2} were friends.",
        "And so {N} learned that {proverb}.",
        "{time}, everybody in the {place} was {feeling}.",
        "{N} went home {adverb} and slept until noon.",
        "In the end {S} was {feeling}, but also a little {feeling}.",
        "That is the end of the story.",
        "'Now I know that {proverb},' said {N}.",
        "Since then, {S} has always kept the {object} in {P} {room}.",
    ],
    "fact": [
        "A@ {animal} is an animal that lives near the {place} and often {third:animal_act}.",
        "Most {pl:animal} {base:animal_act} {time}.",
        "A@ {object} is a thing made of {material} or {material}.",
        "People use a@ {object} in the {room} or in the {place}.",
        "A@ {job} usually works in the {place}.",
        "A good {job} should be {trait} and {trait}.",
        "{pl:plant} grow best in {adj} ground and need much water.",
        "The {plant} has {colour} leaves and {colour} flowers.",
        "{vegetable} soup is a meal that many children like.",
        "In {month} the {plant} is {adj}, and in {month} it is {adj}.",
        "There are {n} kinds of {pl:animal} in the zoo.",
        "{subject} and {subject} are subjects that students learn at school.",
        "{material} is harder than {material}.",
        "A@ {machine} does not work without care: somebody has to clean it every {n} days.",
        "{sport} is a game for two teams, and each game lasts {n} minutes.",
        "{colour} and {colour} are colours.",
        "Whoever likes {hobby} often likes {hobby} as well.",
        "The word {abstract} is more difficult than {abstract}.",
        "Without {abstract} there is no {abstract}.",
        "The {body} is a part of the body, and so is the {body}.",
    ],
    "advice": [
        "If you have {ailment}, {remedy} [may help|often helps|can help].",
        "Try to {base:habit} and {base:habit} every day.",
        "{remedy} and {remedy} are good for {ailment}.",
        "Do not worry about {ailment} that lasts only {2-9} days.",
        "If {ailment} gets worse after {2-9} days, ask a doctor.",
        "People who {base:habit} have {ailment} less often.",
        "It is a good idea to {base:habit} {time}.",
        "Many people get {ailment} in the winter.",
        "Your {body} and your {body} need rest after hard work.",
        "Be careful when your {body} hurts or looks red.",
        "A pharmacist can explain which tablets are right for {ailment}.",
        "Children with {ailment} should stay at home.",
        "Older people should {base:habit} at least {2-9} times a week.",
        "{ing:habit} keeps the {body} strong.",
        "A normal temperature is about 37 degrees, and more than 38 is called a fever.",
        "With {ailment} you should rest for {2-9} days and not lift heavy things.",
        "After an accident, call for help first and keep the person warm.",
        "Good sleep is as important as good food.",
        "The pain in the {body} usually goes away within {2-9} weeks.",
        "Swelling goes down with {remedy}.",
    ],
    "question": [
        "Where is the {object}?",
        "Why are you {feeling}?",
        "Did you {base:vp_yours}?",
        "Can you {base:vp_yours}?",
        "What did you do {time}?",
        "Who is the {job} over there?",
        "How far is it to {town}?",
        "Do you like {hobby}?",
        "How many {pl:object} do you have?",
        "What colour is your {cloth}?",
        "When does the {vehicle} leave?",
        "What would you like to eat?",
        "Have you ever seen a@ {animal}?",
        "Which {object} is yours?",
        "Shall we go to the {place}?",
        "What is the weather like in {town}?",
        "How old is your {pet}?",
    ],
    "reply": [
        "It is in the {room}, next to the {object}.",
        "I am {feeling} because I {past:vp_mine}.",
        "No, but I {past:vp_mine}.",
        "Yes, I {past:vp_mine} {time}.",
        "I {past:vp_mine}, and then I {past:vp_mine}.",
        "That is {name}, a@ {job} from {town}.",
        "It is {n} miles, so we should take the {vehicle}.",
        "Yes, but I like {hobby} more.",
        "I have {n} of them.",
        "It is {colour}, and the other one is {colour}.",
        "It leaves at {1-12} o'clock.",
        "I would like {a_food}, please.",
        "I do not know. Ask the {job}.",
        "It is {sky} there, I think.",
        "The {colour} one is mine.",
        "He is {2-15} years old.",
        "With pleasure. I only have to {base:vp_mine} first.",
        "That is a@ {adj} question. Let me think about it.",
    ],
    "step": [
        "[take|get|find] a@ {adj} {object} and put it on the {object}.",
        "clean the {object} {adverb}.",
        "cut the {material} into {2-12} pieces.",
        "wait {n} minutes.",
        "paint it {colour} and let it dry for {n} hours.",
        "fix the {object} to the {object} with a@ {object}.",
        "check that the {object} is {adj}.",
        "fill the {object} with water.",
        "ask somebody to hold the {object}.",
        "turn the {object} {adverb}.",
        "measure the {object}: it should be {n} inches long.",
        "if the {object} is too {adj}, use a@ {adj} one.",
        "repeat this with the other {object}.",
        "put everything back.",
    ],
    "travel": [
        "from the {vehicle} we saw {landscape} and {landscape}.",
        "the {place} of {town} is {quality}.",
        "we slept in a@ {adj} hotel near the {place}.",
        "the people there were {trait} and sold {pl:object}.",
        "we ate {meal} and drank {drink}.",
        "a@ {job} told us about the {adj} {place}.",
        "the road went {direction} through {landscape}.",
        "it was {sky}, with {0-35} degrees at noon.",
        "from {town} to {town} it is {n} miles by {vehicle}.",
        "on the way we {past:vp_we}.",
        "whoever goes there should take {a_object} and a@ {cloth}.",
        "{time} we went on to {town}.",
    ],
    "diary": [
        "I {past:vp_mine}.",
        "I {past:vp_mine} and {past:vp_mine}.",
        "{time} I {past:vp_mine}.",
        "It was {sky} today.",
        "I feel {feeling}.",
        "{name} {past:vp_mine}, which made me {feeling}.",
        "I must not forget to {base:vp_mine}.",
        "Tomorrow I want to {base:vp_mine}.",
        "My {relative} is {trait}, but I am more {trait}.",
        "I have been thinking about the {abstract}.",
        "The {pet} is {feeling} again.",
        "We have had {n} visitors this week.",
        "My {relative} says that {proverb}.",
    ],
    "news": [
        "the {place} of {town} will be closed from {month} to {month}.",
        "a@ {trait} {job} found {a_object} in the {place}.",
        "the price of {pl:object} went up by {n} percent.",
        "about {n} people came to the festival in the {place}.",
        "the {machine} in the {place} is broken again, and nobody can repair it.",
        "{name} {surname} won a prize for {hobby}.",
        "the town council talked about the {abstract} of the {place} for {n} hours.",
        "{pl:animal} were seen near the {place}.",
        "students of {subject} built {a_machine} out of {material}.",
        "the {job} said that nobody was hurt.",
        "work on the new {place} begins in {month} and will take {n} months.",
        "the old {place} has a new owner.",
    ],
}


def _with_owner(owner: str) -> list[str]:
    """The verb phrases with the possessive written out, for persons that are not the main one of a document."""
    return [phrase.replace("{rel}", f"{{{owner}}}") for phrase in words.VERB_PHRASES]


for _suffix, _owner in (("mine", "my"), ("yours", "your"), ("we", "our"), ("they", "their")):
    RULES[f"vp_{_suffix}"] = _with_owner(f"rel_{_suffix}")
    RULES[f"rel_{_suffix}"] = [f"{_owner} {{relative}}", f"{_owner} {{relative}}", "the {job}", "{name}"]
RULES["vp2"] = _with_owner("rel2")
RULES["rel2"] = ["{P2} {relative}", "the {job}", "{name}"]


class Writer:
    """Writes one document after another from one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.grammar = Grammar(RULES, rng)

    def cast(self) -> None:
        """Forget the last document and choose two new persons."""
        slots: dict[str, str] = {}
        for suffix in ("", "2"):
            female = self.rng.random() < 0.5
            name = self.rng.choice(words.WOMEN if female else words.MEN)
            pronouns = ("she", "her", "her") if female else ("he", "him", "his")
            slots |= {f"{key}{suffix}": value for key, value in zip("NSOP", (name, *pronouns), strict=True)}
        self.grammar.slots = slots

    def say(self, template: str) -> str:
        return self.grammar.text(template)

    def several(self, rule: str, low: int, high: int) -> list[str]:
        return [finish(text) for text in self.grammar.some(rule, self.rng.randint(low, high))]

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def full_name(self) -> str:
        return self.say("{name} {surname}")

    # -- documents of prose ------------------------------------------------------------------------------------------

    def story(self) -> str:
        begin, middle = self.say("{story_begin}"), self.several("story_middle", 4, 9)
        end = self.several("story_end", 1, 2)
        title = self.rng.choice(
            ["", "", self.say("The {adj} {object}") + "\n", self.say("{N} and the {animal}") + "\n"]
        )
        half = len(middle) // 2
        return f"{title}{begin} {' '.join(middle[:half])}\n{' '.join(middle[half:])} {' '.join(end)}"

    def letter(self) -> str:
        opening = self.say(
            "Dear {N},\n[thank you for your letter.|I hope you are well.|how are you?|it has been a long time.]"
        )
        close = self.say("[Best wishes|Yours|With love|Many greetings from {town}],\n{N2}")
        return f"{opening} {' '.join(self.several('diary', 3, 7))}\n{close}"

    def diary(self) -> str:
        return self.say("{day}, {1-30} {month}\n") + " ".join(self.several("diary", 3, 8))

    def encyclopedia(self) -> str:
        return " ".join(self.several("fact", 3, 7))

    def advice(self) -> str:
        title = self.rng.choice(
            ["", self.say("What helps against {ailment}?\n"), "Staying healthy\n", "Good to know\n"]
        )
        return title + " ".join(self.several("advice", 4, 8))

    def travel(self) -> str:
        begin = self.say("{time} [we travelled|I travelled with my {relative}|{N} travelled] to {town} by {vehicle}.")
        return f"{begin} {' '.join(self.several('travel', 4, 7))}"

    def news(self) -> str:
        return self.say("News from {town}, {1-30} {month}\n") + " ".join(self.several("news", 2, 5))

    def dialogue(self) -> str:
        first, second = self.grammar.slots["N"], self.grammar.slots["N2"]
        lines = [self.say(f"{first}: {{greeting}}, {second}. {{question}}"), self.say(f"{second}: {{reply}}")]
        for _ in range(self.number(1, 4)):
            lines += [
                self.say(f"{first}: [|I see. |Really? |Thank you. ]{{question}}"),
                self.say(f"{second}: {{reply}}"),
            ]
        return "\n".join(lines)

    def instructions(self) -> str:
        title = self.say(
            "How to [repair a@ {machine}|build a@ {object}|clean a@ {object}|paint the {room}|wash a@ {cloth}]"
        )
        return "\n".join([title, *(f"{i}. {step}" for i, step in enumerate(self.several("step", 3, 6), 1))])

    # -- documents that state facts and then repeat them in prose ----------------------------------------------------

    def recipe(self) -> str:
        baking = self.rng.random() < 0.4
        items = self.grammar.some("baking", 4) if baking else [
            *self.grammar.some("vegetable", 2), *self.grammar.some("meat", 1), *self.grammar.some("staple", 1),
            *self.grammar.some("spice", 2),
        ]  # fmt: skip
        amounts = [self.say("[{1-9} cups of|{10-500} grams of|{1-9} spoons of|a little|some]") for _ in items]
        minutes, people = self.number(5, 90), self.number(2, 8)
        lines = [f"- {amount.lower()} {item}" for amount, item in zip(amounts, items, strict=True)]
        steps = [f"Wash the {items[0]} and cut the {items[1]}.", f"Fry the {items[2]} and the {items[0]} in a hot pan.",
                 f"Add the {join_list(items[3:])}.", f"Cook everything for {minutes} minutes."]  # fmt: skip
        if baking:
            steps = [f"Mix the {items[0]} with the {items[1]}.", f"Add the {items[2]} and stir.",
                     f"Put the {items[3]} on top.", f"Bake for {minutes} minutes."]  # fmt: skip
        head = (
            f"{self.say('{N}')}'s {items[0]} {'cake' if baking else 'pot'}\nServes: {people}\nTime: {minutes} minutes"
        )
        return "\n".join([head, *lines, "Method: " + " ".join([*steps, f"This is enough for {people} people."])])

    def weather(self) -> str:
        town, sky, wind, day = (self.say(f"{{{key}}}") for key in ("town", "sky", "direction", "day"))
        degrees, speed, rain = self.number(0, 39), self.number(3, 99), self.number(0, 60)
        tenth, pressure = self.number(0, 9), self.number(970, 1040)
        facts = [f"Weather in {town} on {day}", f"Temperature: {degrees}.{tenth}",
                 f"Wind: {speed} from the {wind.lower()}",
                 f"Pressure: {pressure}", f"Rain: {rain}"]  # fmt: skip
        prose = [f"On {day} it was {sky.lower()} in {town} with a temperature of {degrees}.{tenth} degrees.",
                 f"The wind came from the {wind.lower()} at {speed} miles per hour, and the pressure was {pressure}.",
                 f"There were {rain} millimetres of rain." if rain else "There was no rain."]  # fmt: skip
        if degrees >= 28:
            prose.append("It was a hot day.")
        elif degrees <= 5:
            prose.append("It was a cold day.")
        return "\n".join([*facts, f"Sky: {sky.lower()}", "Report: " + " ".join(prose)])

    def profile(self) -> str:
        self.cast()
        slots = self.grammar.slots
        name, age = f"{slots['N']} {self.say('{surname}')}", self.number(18, 90)
        job, town, first, second, trait = (
            self.grammar.expand(f"{{{k}}}") for k in ("job", "town", "hobby", "hobby", "trait")
        )
        years = self.number(2, age - 15)
        facts = [
            f"Person: {name}, {age}",
            f"Job: {job} for {years} years",
            f"Town: {town}",
            f"Likes: {first}, {second}",
        ]
        prose = finish(
            f"{name} is a@ {age}-year-old {job} from {town}. {slots['S']} has been a@ {job} for {years} years. "
            f"{slots['S']} likes {first} and {second}. People say that {slots['S']} is {trait}."
        )
        return "\n".join([*facts, f"Profile: {prose}"])

    def advert(self) -> str:
        thing = self.say("{adj} {object}").lower()
        colour, material = self.say("{colour}").lower(), self.say("{material}").lower()
        price, phone, days = self.number(2, 950), self.number(1000, 9999), self.number(2, 30)
        facts = [
            f"For sale: {thing}",
            f"Colour: {colour}",
            f"Material: {material}",
            f"Price: {price}",
            f"Telephone: {phone}",
        ]
        prose = finish(
            f"I am selling a@ {thing}. It is {colour} and made of {material}. The price is {price} coins. "
            f"Please call {phone} within {days} days."
        )
        return "\n".join([*facts, f"Text: {prose}"])

    def match(self) -> str:
        home, away = self.rng.sample(words.TEAMS, 2)
        town, player, sport = self.say("{town}"), self.full_name(), self.say("{sport}").lower()
        ours, theirs, visitors, minute = self.number(0, 9), self.number(0, 9), self.number(20, 9000), self.number(1, 90)
        result = f"{home} won" if ours > theirs else f"{away} won" if theirs > ours else "nobody won"
        return (
            f"Game: {sport}\nTeams: {home} and {away}\nPlace: {town}\nScore: {ours} to {theirs}\nVisitors: {visitors}\n"
            f"Summary: The {home} met the {away} in {town} for a game of {sport}. After {ours} to {theirs}, {result}. "
            f"In minute {minute}, {player} left the field. There were {visitors} visitors."
        )

    def lost_pet(self) -> str:
        pet, name, colour, place = (self.say(f"{{{k}}}") for k in ("pet", "pet_name", "colour", "place"))
        owner, years, days = self.full_name(), self.number(2, 17), self.number(2, 20)
        return finish(
            f"Lost: {pet.lower()}, {years} years, {colour.lower()}\nName: {name}\nSince: {days} days\nOwner: {owner}\n"
            f"Notice: {owner} is looking for a@ {pet.lower()} called {name}. The {pet.lower()} is {years} years old "
            f"and {colour.lower()}. {name} was last seen near the {place.lower()} {days} days ago."
        )

    def timetable(self) -> str:
        start, goal, via = self.rng.sample(words.TOWNS, 3)
        vehicle, hour, minute = self.say("{vehicle}").lower(), self.number(1, 22), self.number(10, 59)
        number, length, class_ = self.number(10, 999), self.number(20, 300), self.rng.choice(["first", "second"])
        return (
            f"{vehicle.capitalize()} {number}: {start} to {goal}\nLeaves: {hour}:{minute}\n"
            f"Via: {via}\nTakes: {length} minutes\n"
            f"Announcement: The {vehicle} number {number} to {goal} leaves {start} at {hour}:{minute}. "
            f"It goes by way of {via} and takes {length} minutes. Please show your {class_} class ticket."
        )

    def bill(self) -> str:
        things = [item.lower() for item in self.several("object", 2, 4)]
        counts, buyer = [self.number(2, 40) for _ in things], self.full_name()
        total, day = self.number(20, 999), self.say("{day}")
        lines = [f"{thing}: {count}" for thing, count in zip(things, counts, strict=True)]
        bought = join_list([f"{count} of the {thing}" for thing, count in zip(things, counts, strict=True)])
        return "\n".join([f"Order by {buyer}", *lines, f"Total: {total}",
                          f"Answer: Dear {buyer}, you ordered {bought}. The total is {total} coins. "
                          f"You can have them on {day}."])  # fmt: skip

    def lesson(self) -> str:
        teacher, subject, room = self.full_name(), self.say("{subject}"), self.number(1, 60)
        done, all_ = sorted(self.rng.sample(range(1, 13), 2))
        marks = (self.number(1, 10), self.number(1, 10))
        change = "better" if marks[1] > marks[0] else "worse" if marks[1] < marks[0] else "the same"
        return (
            f"Course: {subject}, lesson {done} of {all_}\nTeacher: {teacher}\nRoom: {room}\n"
            f"Mark: {marks[0]} before, {marks[1]} after\n"
            f"Comment: {teacher} gave lesson {done} of {all_} in {subject}. "
            f"The class met in room {room}. The mark was {marks[0]} before and {marks[1]} after, "
            f"which is {change}. The next lesson is number {done + 1}."
        )

    def echo(self) -> str:
        """A list read twice: the plainest copying there is."""
        rule = self.rng.choice(["object", "animal", "food", "adj", "surname", "town", "job", "body", "colour", "plant"])
        items = [
            f"{item} {self.number(1, 250)}" if self.rng.random() < 0.5 else item
            for item in self.grammar.some(rule, self.number(3, 8))
        ]
        line = ", ".join(items)
        return self.rng.choice(
            [f"List: {line}\nAgain: {line}", f"Read: {line}.\nNow write: {line}.", f"{line}\n{line}"]
        )

    def codes(self) -> str:
        """Readings with numbers and short labels, said once more in another order."""
        labels = self.rng.sample(
            [a + b for a in "ABCDEFGHIKLMNOPRSTUVW" for b in ["", "", *"abcdeilmnoprst23BCDHKLMNPRST"]], 4
        )
        values = [self.rng.choice([f"{self.number(1, 250)}", f"{self.number(1, 99)}.{self.number(0, 9)}",
                                   f"{self.number(10, 199)}/{self.number(10, 99)}"]) for _ in labels]  # fmt: skip
        pairs = [f"{label} {value}" for label, value in zip(labels, values, strict=True)]
        machine, place = self.say("{machine}").lower(), self.say("{place}").lower()
        said = list(pairs)
        if self.rng.random() < 0.5:
            self.rng.shuffle(said)
        return (
            f"Readings of the {machine}: {', '.join(pairs)}\nLog: the {machine} in the {place} shows {' '.join(said)}."
        )


Document = Callable[[Writer], str]

# How often each kind of document comes up.
KINDS: list[tuple[Document, int]] = [
    (Writer.story, 16), (Writer.letter, 6), (Writer.diary, 5), (Writer.encyclopedia, 6), (Writer.advice, 9),
    (Writer.travel, 6), (Writer.news, 5), (Writer.dialogue, 7), (Writer.instructions, 5), (Writer.recipe, 6),
    (Writer.weather, 5), (Writer.profile, 6), (Writer.advert, 4), (Writer.match, 4), (Writer.lost_pet, 4),
    (Writer.timetable, 4), (Writer.bill, 4), (Writer.lesson, 4), (Writer.echo, 8), (Writer.codes, 6),
]  # fmt: skip


def general_documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same documents."""
    rng = random.Random(seed)
    writer = Writer(rng)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        kind = rng.choices(kinds, weights)[0]
        writer.cast()
        yield kind(writer)
