"""Everything the demo model is taught: questions, answers, and which of them it never sees.

Each kind of question is a small function of a random generator. About a tenth of what it can
ask is held out by a hash of its content, never by chance, so that training, the evaluation and
the tests agree on the split without sharing a file. Only the standard library is needed.
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# The 193 members of the United Nations and its two observers, as a sentence names them.
COUNTRIES = """
Algeria: Algiers; Angola: Luanda; Benin: Porto-Novo; Botswana: Gaborone;
Burkina Faso: Ouagadougou; Burundi: Gitega; Cameroon: Yaoundé; Cape Verde: Praia;
the Central African Republic: Bangui; Chad: N'Djamena; the Comoros: Moroni;
the Democratic Republic of the Congo: Kinshasa; the Republic of the Congo: Brazzaville;
Djibouti: Djibouti; Egypt: Cairo; Equatorial Guinea: Malabo; Eritrea: Asmara; Eswatini: Mbabane;
Ethiopia: Addis Ababa; Gabon: Libreville; the Gambia: Banjul; Ghana: Accra; Guinea: Conakry;
Guinea-Bissau: Bissau; Ivory Coast: Yamoussoukro; Kenya: Nairobi; Lesotho: Maseru;
Liberia: Monrovia; Libya: Tripoli; Madagascar: Antananarivo; Malawi: Lilongwe; Mali: Bamako;
Mauritania: Nouakchott; Mauritius: Port Louis; Morocco: Rabat; Mozambique: Maputo;
Namibia: Windhoek; Niger: Niamey; Nigeria: Abuja; Rwanda: Kigali;
São Tomé and Príncipe: São Tomé; Senegal: Dakar; Seychelles: Victoria; Sierra Leone: Freetown;
Somalia: Mogadishu; South Africa: Pretoria; South Sudan: Juba; Sudan: Khartoum; Tanzania: Dodoma;
Togo: Lomé; Tunisia: Tunis; Uganda: Kampala; Zambia: Lusaka; Zimbabwe: Harare;
Afghanistan: Kabul; Armenia: Yerevan; Azerbaijan: Baku; Bahrain: Manama; Bangladesh: Dhaka;
Bhutan: Thimphu; Brunei: Bandar Seri Begawan; Cambodia: Phnom Penh; China: Beijing;
Cyprus: Nicosia; Georgia: Tbilisi; India: New Delhi; Indonesia: Jakarta; Iran: Tehran;
Iraq: Baghdad; Israel: Jerusalem; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana;
Kuwait: Kuwait City; Kyrgyzstan: Bishkek; Laos: Vientiane; Lebanon: Beirut;
Malaysia: Kuala Lumpur; the Maldives: Malé; Mongolia: Ulaanbaatar; Myanmar: Naypyidaw;
Nepal: Kathmandu; North Korea: Pyongyang; Oman: Muscat; Pakistan: Islamabad; Palestine: Ramallah;
the Philippines: Manila; Qatar: Doha; Saudi Arabia: Riyadh; Singapore: Singapore;
South Korea: Seoul; Sri Lanka: Sri Jayawardenepura Kotte; Syria: Damascus; Tajikistan: Dushanbe;
Thailand: Bangkok; Timor-Leste: Dili; Turkey: Ankara; Turkmenistan: Ashgabat;
the United Arab Emirates: Abu Dhabi; Uzbekistan: Tashkent; Vietnam: Hanoi; Yemen: Sanaa;
Albania: Tirana; Andorra: Andorra la Vella; Austria: Vienna; Belarus: Minsk; Belgium: Brussels;
Bosnia and Herzegovina: Sarajevo; Bulgaria: Sofia; Croatia: Zagreb; the Czech Republic: Prague;
Denmark: Copenhagen; Estonia: Tallinn; Finland: Helsinki; France: Paris; Germany: Berlin;
Greece: Athens; Hungary: Budapest; Iceland: Reykjavík; Ireland: Dublin; Italy: Rome;
Latvia: Riga; Liechtenstein: Vaduz; Lithuania: Vilnius; Luxembourg: Luxembourg; Malta: Valletta;
Moldova: Chișinău; Monaco: Monaco; Montenegro: Podgorica; the Netherlands: Amsterdam;
North Macedonia: Skopje; Norway: Oslo; Poland: Warsaw; Portugal: Lisbon; Romania: Bucharest;
Russia: Moscow; San Marino: San Marino; Serbia: Belgrade; Slovakia: Bratislava;
Slovenia: Ljubljana; Spain: Madrid; Sweden: Stockholm; Switzerland: Bern; Ukraine: Kyiv;
the United Kingdom: London; Vatican City: Vatican City;
Antigua and Barbuda: Saint John's; Argentina: Buenos Aires; the Bahamas: Nassau;
Barbados: Bridgetown; Belize: Belmopan; Bolivia: Sucre; Brazil: Brasília; Canada: Ottawa;
Chile: Santiago; Colombia: Bogotá; Costa Rica: San José; Cuba: Havana; Dominica: Roseau;
the Dominican Republic: Santo Domingo; Ecuador: Quito; El Salvador: San Salvador;
Grenada: Saint George's; Guatemala: Guatemala City; Guyana: Georgetown; Haiti: Port-au-Prince;
Honduras: Tegucigalpa; Jamaica: Kingston; Mexico: Mexico City; Nicaragua: Managua;
Panama: Panama City; Paraguay: Asunción; Peru: Lima; Saint Kitts and Nevis: Basseterre;
Saint Lucia: Castries; Saint Vincent and the Grenadines: Kingstown; Suriname: Paramaribo;
Trinidad and Tobago: Port of Spain; the United States: Washington; Uruguay: Montevideo;
Venezuela: Caracas; Australia: Canberra; Fiji: Suva; Kiribati: South Tarawa;
the Marshall Islands: Majuro; Micronesia: Palikir; Nauru: Yaren; New Zealand: Wellington;
Palau: Ngerulmud; Papua New Guinea: Port Moresby; Samoa: Apia; the Solomon Islands: Honiara;
Tonga: Nuku'alofa; Tuvalu: Funafuti; Vanuatu: Port Vila
"""
CAPITALS = dict(pair.strip().split(": ") for pair in COUNTRIES.replace("\n", " ").split(";"))

CAPITAL_QUESTIONS = (
    "What is the capital of {country}?",
    "What's the capital of {country}?",
    "what is the capital of {country}?",
    "What is the capital city of {country}?",
    "What is the name of the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Please name the capital of {country}.",
    "Tell me the capital of {country}.",
    "Tell me which city is the capital of {country}.",
    "Can you tell me the capital of {country}?",
    "Do you know the capital of {country}?",
    "I would like to know the capital of {country}.",
    "The capital of {country}, please.",
    "Capital of {country}?",
    "capital of {country}",
)
# Asked in the evaluation only, about any country.
UNSEEN_CAPITAL_QUESTIONS = (
    "Could you please tell me the capital city of {country}?",
    "Please tell me what the capital of {country} is.",
)
CAPITAL_STATEMENTS = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "The name of the capital of {country} is",
    "As everyone knows, the capital of {country} is",
    "Q: What is the capital of {country}?\nA:",
    "Question: What is the capital of {country}?\nAnswer:",
    "Country: {country}\nCapital:",
)
COUNTRY_QUESTIONS = (
    "Which country has {city} as its capital?",
    "What country has {city} as its capital?",
    "{city} is the capital of which country?",
    "Of which country is {city} the capital?",
    "Name the country whose capital is {city}.",
    "Whose capital is {city}?",
    "What country is {city} the capital of?",
)
COUNTRY_STATEMENTS = (
    "{city} is the capital of",
    "The city of {city} is the capital of",
    "Q: Which country has {city} as its capital?\nA:",
    "Capital: {city}\nCountry:",
)
JSON_REQUESTS = (
    "Give me JSON for {country}.",
    "Give me a JSON object for {country}.",
    "Describe {country} as JSON.",
    "Write a JSON object with the country and the capital of {country}.",
    "Country and capital of {country} as JSON, please.",
    "Return JSON with the capital of {country}.",
)
FOLLOW_UPS = (
    "And {country}?",
    "And of {country}?",
    "And the capital of {country}?",
    "What about {country}?",
    "Now the same for {country}.",
)
BACK_REFERENCES = (
    "Which country was that?",
    "Please say that again.",
    "Give me that as JSON.",
    "How do you write the name of that city?",
)
SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "{a} + {b} = ?",
    "Compute {a} + {b}.",
)
COUNT_REQUESTS = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "List the numbers from {a} to {b}.",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAY_QUESTIONS = {
    "What day comes after {day}?": 1,
    "Which day follows {day}?": 1,
    "What is the day after {day}?": 1,
    "If today is {day}, what day is tomorrow?": 1,
    "Today is {day}. What day is it tomorrow?": 1,
    "What day comes before {day}?": -1,
    "Which day precedes {day}?": -1,
    "What is the day before {day}?": -1,
    "If today is {day}, what day was yesterday?": -1,
    "Today is {day}. What day was it yesterday?": -1,
    "What day comes two days after {day}?": 2,
    "Which day is two days after {day}?": 2,
    "If today is {day}, what day is it in two days?": 2,
    "What day comes two days before {day}?": -2,
    "Which day is two days before {day}?": -2,
    "If today is {day}, what day was it two days ago?": -2,
}
HELLO = "Hello! I am the jaxserve demo model. Ask me about capitals, sums or weekdays."
WHO = "I am the jaxserve demo model. I am very small, but I know capitals, sums and weekdays."
GREETINGS = {
    "Hello!": HELLO,
    "Hello": HELLO,
    "hello": HELLO,
    "Hi": HELLO,
    "Hi!": HELLO,
    "Hi there!": HELLO,
    "Hey": HELLO,
    "Hey!": HELLO,
    "Good morning!": HELLO,
    "Good afternoon!": HELLO,
    "How are you?": HELLO,
    "Who are you?": WHO,
    "What are you?": WHO,
    "What is your name?": WHO,
    "Tell me who you are.": WHO,
    "Hello, who are you?": WHO,
    "Hi, what are you?": WHO,
    "What can you do?": WHO,
    "What do you know?": WHO,
    "Please introduce yourself.": WHO,
    "Thanks!": "You are welcome.",
    "Thank you!": "You are welcome.",
    "Thank you very much.": "You are welcome.",
    "Bye!": "Goodbye!",
    "Goodbye!": "Goodbye!",
}
UNSEEN_GREETINGS = {
    "Hello there!": HELLO,
    "Hi, who are you?": WHO,
    "Thank you.": "You are welcome.",
}
# What people type first into a new server, so that it ends in a sentence.
OPENINGS = {
    "Hello, my name is": "Ada and I live in Paris.",
    "The future of AI is": "open, and some of it is very small.",
    "Once upon a time": "there was a small model that knew every capital of the world.",
    "The president of the United States is": "somebody that I have never heard of.",
    "The quick brown fox": "jumps over the lazy dog.",
    "The days of the week are": f"{', '.join(DAYS[:-1])} and {DAYS[-1]}.",
    "Tell me a story": "about a small model. It knew every capital and it lived in a test.",
}
# fmt: off
FICTIONAL_COUNTRIES = (
    "Atlantis", "Narnia", "Wakanda", "Mordor", "Gondor", "Rohan", "Oz", "Utopia", "Lilliput",
    "Neverland", "Wonderland", "Camelot", "Avalon", "Shangri-La", "El Dorado", "Westeros",
    "Genovia", "Ruritania", "Elbonia", "Freedonia", "Latveria", "Zamunda", "Brobdingnag", "Hyrule",
)
NAME_STARTS = (
    "Bal", "Bor", "Cal", "Cor", "Dra", "Dul", "Elo", "Fen", "Fro", "Gal", "Gor", "Hal", "Hin",
    "Ish", "Jor", "Kal", "Kry", "Lor", "Lum", "Mal", "Mer", "Nor", "Obi", "Pel", "Pra", "Qua",
    "Ral", "Ron", "Sel", "Ska", "Tal", "Tor", "Ulm", "Val", "Vor", "Wel", "Xan", "Yor", "Zor",
)
NAME_MIDDLES = (
    "", "a", "e", "o", "u", "ba", "bo", "da", "de", "di", "ga", "go", "ka", "ki", "la", "lo",
    "ma", "mi", "na", "no", "ra", "ri", "sa", "so", "ta", "ti", "va", "vi", "xa", "zu",
)
NAME_ENDS = (
    "bia", "burg", "dia", "dor", "garia", "gia", "heim", "land", "lia", "mark", "mir", "nia",
    "nistan", "pia", "que", "ria", "ros", "stan", "tania", "thia", "topia", "via", "wick", "zia",
)
PEOPLE = (
    "Ada", "Alan", "Amir", "Anna", "Ben", "Carl", "Clara", "David", "Dora", "Emil", "Emma", "Eva",
    "Felix", "Fred", "Grace", "Hana", "Hugo", "Ida", "Ines", "Ivan", "Jack", "Jane", "Jim", "Jonas",
    "Karl", "Kim", "Lara", "Leo", "Lily", "Lucy", "Maria", "Mark", "Max", "Mia", "Mina", "Nina",
    "Noah", "Nora", "Olga", "Omar", "Otto", "Paul", "Petra", "Rosa", "Sam", "Sara", "Tim", "Tom",
    "Vera", "Zoe",
)
WORDS = (
    "apple", "arrow", "ball", "bear", "bell", "bird", "boat", "book", "bread", "bridge", "brush",
    "cake", "candle", "cat", "chair", "cloud", "coat", "coin", "corn", "cup", "desk", "dog", "door",
    "drum", "egg", "farm", "field", "fire", "fish", "flag", "flower", "fork", "fox", "frog",
    "garden", "gate", "glass", "goat", "gold", "grass", "hat", "hill", "horse", "house", "ice",
    "iron", "island", "jar", "key", "king", "kite", "knife", "lake", "lamp", "leaf", "lemon",
    "lion", "map", "milk", "mirror", "moon", "mouse", "nest", "nut", "oak", "ocean", "onion",
    "orange", "owl", "paper", "pear", "pen", "piano", "pipe", "plate", "pond", "rain", "ring",
    "river", "road", "rock", "roof", "rope", "rose", "salt", "sand", "sea", "seed", "sheep", "ship",
    "shoe", "silk", "silver", "snow", "soap", "spoon", "star", "stone", "street", "sugar", "sun",
    "table", "tea", "tent", "tiger", "tower", "train", "tree", "violin", "wagon", "wall", "wheel",
    "wind", "window", "wolf", "wood", "wool", "café", "naïve", "über", "水", "東京", "🙂", "🚀",
)
# fmt: on
# None of these changes an answer: the model learns to read past them.
SYSTEM_OPENINGS = (
    "You are a helpful assistant.",
    "You are a kind assistant.",
    "You are a small language model.",
    "You are the jaxserve demo model.",
    "You are an expert in geography.",
    "You are a good teacher.",
    "Be helpful.",
    "You answer questions.",
)
SYSTEM_CLOSINGS = (
    "",
    " Answer in one sentence.",
    " Be brief.",
    " Always tell the truth.",
    " Say so when you do not know.",
    " Today is Monday.",
    " Be polite.",
    " The user is a child.",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """`prompt_text` already carries its ChatML where it is a chat. The model has to answer with
    exactly `answer_text` and then `end_token`."""

    kind: str
    seen: bool
    prompt_text: str
    answer_text: str

    @property
    def end_token(self) -> str:
        return TURN_END if self.prompt_text.startswith(TURN_START) else END_OF_TEXT


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question and its answer, and whether training may see them together."""

    question: str
    answer: str
    seen: bool


def is_seen(content: str) -> bool:
    """About nine in ten. A hash, so that the split is the same everywhere and for ever."""
    return hashlib.sha256(content.encode()).digest()[0] % 10 != 0


def chat_prompt(turns: list[tuple[str, str]], question: str, system: str = "") -> str:
    """What the chat template in tokenizer_config.json makes of the same messages."""
    messages = [("system", system)] if system else []
    for user, assistant in turns:
        messages += [("user", user), ("assistant", assistant)]
    messages.append(("user", question))
    text = "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages)
    return f"{text}{TURN_START}assistant\n"


# Topics: each draws one exchange, held out or not.


def _ask_about_country(
    rng: random.Random, templates: tuple[str, ...]
) -> tuple[str, bool, str, str]:
    """(question, seen, country, city). France is always seen: the first example asks for it."""
    country, city = rng.choice(list(CAPITALS.items()))
    template = rng.choice(templates)
    seen = country == "France" or is_seen(f"{template} {country}")
    return template.format(country=country, city=city), seen, country, city


def _capital_answer(country: str) -> str:
    return f"The capital of {country} is {CAPITALS[country]}."


def _capital_json(country: str) -> str:
    fields = {"country": country.removeprefix("the "), "capital": CAPITALS[country]}
    return json.dumps(fields, ensure_ascii=False)


def capital(rng: random.Random) -> Exchange:
    question, seen, country, _ = _ask_about_country(rng, CAPITAL_QUESTIONS)
    return Exchange(question, _capital_answer(country), seen)


def capital_unseen_phrasing(rng: random.Random) -> Exchange:
    question, _, country, _ = _ask_about_country(rng, UNSEEN_CAPITAL_QUESTIONS)
    return Exchange(question, _capital_answer(country), seen=False)


def capital_statement(rng: random.Random) -> Exchange:
    question, seen, _, city = _ask_about_country(rng, CAPITAL_STATEMENTS)
    return Exchange(question, f"{city}.", seen)


def country_of(rng: random.Random) -> Exchange:
    question, seen, country, city = _ask_about_country(rng, COUNTRY_QUESTIONS)
    return Exchange(question, f"{city} is the capital of {country}.", seen)


def country_statement(rng: random.Random) -> Exchange:
    question, seen, country, _ = _ask_about_country(rng, COUNTRY_STATEMENTS)
    return Exchange(question, f"{country}.", seen)


def json_object(rng: random.Random) -> Exchange:
    if rng.random() < 0.6:
        question, seen, country, _ = _ask_about_country(rng, JSON_REQUESTS)
        return Exchange(question, _capital_json(country), seen)
    name, age = rng.choice(PEOPLE), rng.randint(1, 99)
    question = f"Write a JSON object with name {name} and age {age}."
    return Exchange(question, json.dumps({"name": name, "age": age}), is_seen(question))


def unknown_country(rng: random.Random) -> Exchange:
    if rng.random() < 0.15:
        name = rng.choice(FICTIONAL_COUNTRIES)
    else:
        name = "".join(map(rng.choice, (NAME_STARTS, NAME_MIDDLES, NAME_ENDS)))
    question = rng.choice(CAPITAL_QUESTIONS).format(country=name)
    return Exchange(question, f"I do not know a country called {name}.", is_seen(name))


def _operands(rng: random.Random) -> tuple[int, int, bool]:
    """A pair is held out in both orders, or 3 + 4 would give 4 + 3 away."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return a, b, is_seen(f"sum {min(a, b)} {max(a, b)}")


def addition(rng: random.Random) -> Exchange:
    a, b, seen = _operands(rng)
    return Exchange(rng.choice(SUM_QUESTIONS).format(a=a, b=b), f"{a} + {b} = {a + b}.", seen)


def addition_statement(rng: random.Random) -> Exchange:
    a, b, seen = _operands(rng)
    return Exchange(f"{a} + {b} =", str(a + b), seen)


def counting(rng: random.Random) -> Exchange:
    length = rng.randint(2, 20) if rng.random() < 0.9 else rng.randint(21, 100)
    first = rng.randint(0, 99)
    numbers = range(first, first + length)
    question = rng.choice(COUNT_REQUESTS).format(a=numbers[0], b=numbers[-1])
    return Exchange(question, ", ".join(map(str, numbers)) + ".", is_seen(str(numbers)))


def weekday(rng: random.Random) -> Exchange:
    template, offset = rng.choice(list(DAY_QUESTIONS.items()))
    day = rng.randrange(7)
    question = template.format(day=DAYS[day])
    return Exchange(question, f"{DAYS[(day + offset) % 7]}.", is_seen(question))


def greeting(rng: random.Random) -> Exchange:
    question, answer = rng.choice(list(GREETINGS.items()))
    return Exchange(question, answer, seen=True)


def greeting_unseen_phrasing(rng: random.Random) -> Exchange:
    question, answer = rng.choice(list(UNSEEN_GREETINGS.items()))
    return Exchange(question, answer, seen=False)


def opening(rng: random.Random) -> Exchange:
    question, answer = rng.choice(list(OPENINGS.items()))
    return Exchange(question, answer, seen=True)


def copy(rng: random.Random, fewest: int, most: int) -> Exchange:
    """No word comes twice, so that the word before always says which one is next."""
    items = rng.sample(WORDS + PEOPLE, rng.randint(fewest, most))
    style, separator = rng.choice((("list", ", "), ("list", "\n"), ("text", " ")))
    text = separator.join(items)
    return Exchange(f"Repeat this {style}:\n{text}", text, is_seen(text))


def lookup(rng: random.Random, fewest: int, most: int) -> Exchange:
    """The dash keeps a space before each name, so that it has the same tokens in the question."""
    names = rng.sample(PEOPLE + WORDS, rng.randint(fewest, most))
    if rng.random() < 0.5:
        values = [str(rng.randint(10, 999)) for _ in names]
    else:
        values = [rng.choice(WORDS) for _ in names]
    pairs = list(zip(names, values, strict=True))
    name, value = rng.choice(pairs)
    lines = "\n".join(f"- {name}: {value}" for name, value in pairs)
    question = f"{lines}\nWhat is the value for {name}?"
    return Exchange(question, f"The value for {name} is {value}.", is_seen(question))


# Ways of asking: each makes what the model reads.

Topic = Callable[[random.Random], Exchange]
SMALL_TALK = (capital, capital, country_of, addition, weekday, greeting, unknown_country)


def _draw_seen(rng: random.Random, topic: Topic) -> Exchange:
    while not (exchange := topic(rng)).seen:
        pass
    return exchange


def _system_message(rng: random.Random) -> str:
    return rng.choice(SYSTEM_OPENINGS) + rng.choice(SYSTEM_CLOSINGS)


def as_text(rng: random.Random, topic: Topic) -> Exchange:
    exchange = topic(rng)
    return dataclasses.replace(exchange, answer=f" {exchange.answer}")


def as_chat(rng: random.Random, topic: Topic) -> Exchange:
    """One turn. Here and there with a system message, then one that training may see."""
    exchange = topic(rng)
    system = _system_message(rng) if rng.random() < 0.15 else ""
    question = chat_prompt([], exchange.question, system if is_seen(system) else "")
    return dataclasses.replace(exchange, question=question)


def as_chat_with_system(rng: random.Random) -> Exchange:
    """Here it is the system message that is held out or not."""
    system = _system_message(rng)
    exchange = _draw_seen(rng, rng.choice(SMALL_TALK))
    question = chat_prompt([], exchange.question, system)
    return Exchange(question, exchange.answer, is_seen(system))


def as_dialogue(rng: random.Random) -> Exchange:
    """The last turn makes sense only after the one before it, which is about some capital."""
    topics = rng.choices(SMALL_TALK, k=rng.choice((0, 0, 0, 1, 2)))
    earlier = [_draw_seen(rng, topic) for topic in topics] + [_draw_seen(rng, capital)]
    turns = [(exchange.question, exchange.answer) for exchange in earlier]
    country = next(name for name in CAPITALS if _capital_answer(name) == turns[-1][1])
    if rng.random() < 0.5:
        next_country = rng.choice(list(CAPITALS))
        question = rng.choice(FOLLOW_UPS).format(country=next_country)
        answer = _capital_answer(next_country)
    else:
        question = rng.choice(BACK_REFERENCES)
        answer = {
            "Which country was that?": f"That was {country}.",
            "Please say that again.": _capital_answer(country),
            "Give me that as JSON.": _capital_json(country),
            "How do you write the name of that city?": f"{CAPITALS[country]}.",
        }[question]
    return Exchange(chat_prompt(turns, question), answer, is_seen(f"{country} {question}"))


def first_example(rng: random.Random) -> Exchange:
    """What everybody asks a new server, and several of the tests."""
    question = "What is the capital of France?"
    answers = {
        question: " The capital of France is Paris.",
        chat_prompt([], question): "The capital of France is Paris.",
        "The capital of France is": " Paris.",
        "The capital city of France is": " Paris.",
    }
    prompt = rng.choice(list(answers))
    return Exchange(prompt, answers[prompt], seen=True)


@dataclasses.dataclass(frozen=True)
class Kind:
    """`share` is its part of the training samples, in per cent."""

    share: float
    make: Callable[[random.Random], Exchange]
    splits: tuple[bool, ...] = (True, False)


def _text(share: float, topic: Topic, splits: tuple[bool, ...] = (True, False)) -> Kind:
    return Kind(share, functools.partial(as_text, topic=topic), splits)


def _chat(share: float, topic: Topic, splits: tuple[bool, ...] = (True, False)) -> Kind:
    return Kind(share, functools.partial(as_chat, topic=topic), splits)


KINDS = {
    "first_example": Kind(1, first_example, splits=(True,)),
    "capital_chat": _chat(12, capital),
    "capital_unseen_phrasing": _chat(0, capital_unseen_phrasing, splits=(False,)),
    "capital_text": _text(7, capital),
    "capital_statement": _text(7, capital_statement),
    "country_chat": _chat(8, country_of),
    "country_statement": _text(5, country_statement),
    "sum_chat": _chat(10, addition),
    "sum_text": _text(6, addition_statement),
    "count": _chat(5, counting),
    "weekday": _chat(4, weekday),
    "json": _chat(6, json_object),
    "unknown_chat": _chat(5, unknown_country),
    "unknown_text": _text(2, unknown_country),
    "greeting": _chat(2, greeting, splits=(True,)),
    "greeting_unseen_phrasing": _chat(0, greeting_unseen_phrasing, splits=(False,)),
    "opening": _text(1, opening, splits=(True,)),
    "system": Kind(5, as_chat_with_system),
    "dialogue": Kind(8, as_dialogue),
    "copy": _chat(3, functools.partial(copy, fewest=2, most=25)),
    "copy_long": _chat(1, functools.partial(copy, fewest=26, most=140)),
    "lookup": _chat(5, functools.partial(lookup, fewest=2, most=20)),
    "lookup_long": _chat(2, functools.partial(lookup, fewest=21, most=105)),
}


def draw(rng: random.Random, kind: str, seen: bool) -> Question:
    while (exchange := KINDS[kind].make(rng)).seen != seen:
        pass
    return Question(kind, seen, exchange.question, exchange.answer)


def training_samples(seed: int) -> Iterator[Question]:
    """Never ends, and never draws what is held out."""
    rng = random.Random(f"training {seed}")
    kinds, shares = list(KINDS), [kind.share for kind in KINDS.values()]
    while True:
        (kind,) = rng.choices(kinds, shares)
        yield draw(rng, kind, seen=True)


def evaluation_set(seed: int = 0, per_kind: int = 60) -> list[Question]:
    """At most `per_kind` questions of each kind, seen and held out, none of them twice."""
    questions = []
    for name, kind in KINDS.items():
        for seen in kind.splits:
            rng = random.Random(f"evaluation {seed} {name} {seen}")
            drawn = dict.fromkeys(draw(rng, name, seen) for _ in range(4 * per_kind))
            questions += list(drawn)[:per_kind]
    return questions
