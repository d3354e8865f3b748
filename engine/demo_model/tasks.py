"""What the demo model is taught: its vocabulary, its texts and the prompts it is judged with.

A document is a run of sentences of a small language of about 400 words: facts ("note anna 57 ."),
requests for an earlier fact ("recall anna 57 .", sometimes "what is the code of anna ? 57 ."),
little stories with consistent people, animals and days, sums, counting, and copying. Everything comes from a seed, and
nothing here needs torch.

Every token has a kind, which says how much its prediction counts in training and which line of the
evaluation it belongs to; every recalled value has its distance to the latest mention of its key.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

BOS, EOS, UNK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<unk>"
VOCAB_SIZE = 448

# ------------------------------------------------------------------------------ vocabulary


def _words(text: str) -> list[str]:
    return text.split()


_SHE = _words("""anna bella carla diana elena fiona greta hanna irene julia karen laura maria nina olga paula
rosa sara tina ursula vera wanda yara zoe alice betty clara dora emma flora gina helga ida jana katja
linda mona nora petra rita stella tessa uma viola wilma agnes berta celia doris edith freda gerda
hilda iris joan kira lena martha nelly orla polly ruth sonja""")
_HE = _words("""adam boris carlo david emil felix georg hugo ivan jonas karl lukas max nico oskar paul
ralf simon tom ulrich viktor walter yuri zeno albert bruno chris dirk erik frank gustav henry ian
jakob kevin leo martin noah otto peter quentin robert stefan theo udo vincent willi anton basil
conrad dennis ernst fritz gregor hans igor jan kurt lars moritz norbert oliver philip""")
NAMES = (*_SHE[:60], *_HE[:60])
_IS_SHE = frozenset(_SHE)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
LETTERS = [chr(ord("a") + i) for i in range(26)]
NUMBERS = [str(i) for i in range(100)]
_FOOD = {
    "dog": ("dogs", "meat"),
    "cat": ("cats", "fish"),
    "bird": ("birds", "seeds"),
    "horse": ("horses", "apples"),
    "rabbit": ("rabbits", "carrots"),
    "mouse": ("mice", "cheese"),
    "cow": ("cows", "grass"),
    "bear": ("bears", "honey"),
    "monkey": ("monkeys", "bananas"),
    "duck": ("ducks", "bread"),
}
ANIMALS = list(_FOOD)
_PLACES = _words("river market forest garden school beach castle farm mountain lake")
_LOOKS = _words("small big old young white black brown grey")
_MOODS = _words("hungry thirsty tired sad cold")
_RELATIVES = _words("mother father brother sister")
_OPPOSITES = {"hot": "cold", "big": "small", "old": "young", "black": "white", "happy": "sad"}
_OPPOSITES |= {"wet": "dry", "fast": "slow", "high": "low", "full": "empty", "open": "closed"}
_GLUE = _words("""the code of is what ? . : + - = on went to there he she saw was gave some slept under
tree sang song for him her his made warm fire then happy followed in evening home told about next
day after before every likes all like one two three walks walk runs run sleeps sleep eats eat count
from copy opposite water and it that good they were friends at night morning rained sun shone
answer very an""")


def _vocabulary() -> list[str]:
    words = [BOS, EOS, UNK, *_GLUE, *NUMBERS, *LETTERS, *NAMES, *DAYS, *_PLACES, *_LOOKS, *_MOODS]
    words += [*_RELATIVES, *_OPPOSITES, *_OPPOSITES.values(), *ANIMALS]
    for plural, food in _FOOD.values():
        words += [plural, food]
    words += ["note", "recall"]
    unique = list(dict.fromkeys(words))
    assert len(unique) <= VOCAB_SIZE, len(unique)
    return unique + [f"<unused{i}>" for i in range(VOCAB_SIZE - len(unique))]


VOCABULARY = _vocabulary()
ID = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Ids of space-separated words, without begin-of-sentence."""
    return [ID.get(word, ID[UNK]) for word in text.split()]


def decode(ids: list[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids)


def write_tokenizer(path: Path) -> None:
    """The same vocabulary as a tokenizer.json: words and marks, begin-of-sentence put in front."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokenizer = Tokenizer(models.WordLevel(vocab=dict(ID), unk_token=UNK))
    tokenizer.add_special_tokens([BOS, EOS, UNK])
    tokenizer.normalizer = normalizers.Lowercase()
    pieces = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pieces
    begin = [(BOS, ID[BOS])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=begin
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.save(str(path))


# ------------------------------------------------------------------------------ documents

TEXT, RANDOM, RECALL, COPY, SUM, RULE, QUESTION = range(7)  # kinds of a token
KIND_NAMES = ("text", "random", "recall", "copy", "sum", "rule", "question")
WEIGHTS = (0.5, 0.05, 3.0, 1.0, 1.0, 1.0, 2.0)  # of a kind's loss; RANDOM cannot be predicted
BANDS = ((1, 128), (128, 512), (512, 1024), (1024, 1 << 30))
BAND_NAMES = ("d<128", "128-511", "512-1023", ">=1024")


@dataclass(frozen=True)
class Mix:
    """How often each kind of sentence comes; the rest are stories and rules."""

    fact: float
    query: float
    copy: float = 0.06
    sum: float = 0.08
    rule: float = 0.10


@dataclass
class Document:
    """Token ids with, for each, its kind and (recalled values) the distance to the last mention."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    distances: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: str, kind: int = TEXT, distance: int = 0) -> None:
        words = encode(text)
        self.ids += words
        self.kinds += [kind] * len(words)
        self.distances += [distance] * len(words)

    def cut(self, length: int) -> Document:
        return Document(self.ids[:length], self.kinds[:length], self.distances[:length])


class Writer:
    """Writes sentences into a document, and knows which key has which value and where it stood."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.doc = Document()
        self.doc.add(BOS)
        self.free = list(NAMES)
        rng.shuffle(self.free)
        self.values: dict[str, str] = {}
        self.where: dict[str, int] = {}  # position of the latest mention of a key's value
        self.open: list[str] = []  # keys that may still be asked for
        self.story: list[str] = []

    def fact(self, key: str | None = None) -> str:
        key = key or self.free.pop()
        if key in self.free:
            self.free.remove(key)
        value = str(self.rng.randrange(10, 100))
        self.doc.add("note")
        self.doc.add(key, RANDOM)
        self.where[key] = len(self.doc)
        self.values[key] = value
        self.open.append(key)
        self.doc.add(value, RANDOM)
        self.doc.add(".")
        return key

    def query(self, key: str, question: bool = False) -> None:
        """Ask for a value: "recall anna 57 .", or as a question, where it does not follow the key."""
        self.doc.add("what is the code of" if question else "recall")
        self.doc.add(key, RANDOM)
        if question:
            self.doc.add("?")
        position = len(self.doc)
        distance = position - self.where[key]
        self.doc.add(self.values[key], QUESTION if question else RECALL, distance)
        self.where[key] = position
        self.doc.add(".")

    def distant_key(self) -> str | None:
        """A key that may be asked for, the distant ones more often; None: rather write on."""
        here = len(self.doc) + 2
        if not self.open or self.rng.random() < 0.3:
            return None
        share = [(here - self.where[key]) ** 0.7 for key in self.open]
        key = self.rng.choices(self.open, share)[0]
        if here - self.where[key] < 64 and self.rng.random() < 0.6:
            return None
        if self.rng.random() < 0.6:
            self.open.remove(key)
        return key

    def copy(self) -> None:
        """Letters, names or numbers, all different: what follows one of them is unambiguous."""
        pool = self.rng.choice((LETTERS, NAMES, NUMBERS, (*LETTERS, *NAMES, *NUMBERS)))
        items = " ".join(self.rng.sample(pool, self.rng.randint(3, 10)))
        self.doc.add("copy")
        self.doc.add(items, RANDOM)
        self.doc.add(":")
        self.doc.add(f"{items} .", COPY)

    def sum(self) -> None:
        a, b = self.rng.randrange(10), self.rng.randrange(10)
        if self.rng.random() < 0.6:
            self.doc.add(f"{a} + {b}", RANDOM)
            result = a + b
        else:
            a, b = max(a, b), min(a, b)
            self.doc.add(f"{a} - {b}", RANDOM)
            result = a - b
        self.doc.add("=")
        self.doc.add(str(result), SUM)
        self.doc.add(".")

    def rule(self) -> None:
        rng, choice = self.rng, self.rng.randrange(4)
        if choice == 0:
            first, count = rng.randrange(90), rng.randint(3, 8)
            self.doc.add("count from")
            self.doc.add(str(first), RANDOM)
            self.doc.add(":")
            self.doc.add(" ".join(str(first + i) for i in range(count)), RULE)
            self.doc.add(".", RANDOM)
        elif choice == 1:
            day, later = rng.randrange(7), rng.random() < 0.5
            self.doc.add(f"the day {'after' if later else 'before'}")
            self.doc.add(DAYS[day], RANDOM)
            self.doc.add("is")
            self.doc.add(f"{DAYS[(day + (1 if later else -1)) % 7]} .", RULE)
        elif choice == 2:
            word = rng.choice(list(_OPPOSITES))
            self.doc.add("the opposite of")
            self.doc.add(word, RANDOM)
            self.doc.add("is")
            self.doc.add(f"{_OPPOSITES[word]} .", RULE)
        else:
            self._agreement()

    def _agreement(self) -> None:
        """One eats, many eat; and every animal has its food."""
        rng, animal = self.rng, self.rng.choice(ANIMALS)
        plural, food = _FOOD[animal]
        verb = rng.choice(("walk", "run", "sleep"))
        if rng.random() < 0.5:
            many = rng.random() < 0.5
            self.doc.add("all" if many else "every")
            self.doc.add(plural if many else animal, RANDOM)
            self.doc.add(f"{'like' if many else 'likes'} {food} .", RULE)
        else:
            many = rng.random() < 0.5
            count = rng.choice(("two", "three")) if many else "one"
            self.doc.add(f"the {count} {rng.choice(_LOOKS)} {plural if many else animal}", RANDOM)
            self.doc.add(verb if many else f"{verb}s", RULE)
            self.doc.add(".")

    def tell(self) -> None:
        """The next sentence of the current story."""
        if not self.story:
            self.story = _story(self.rng)
        self.doc.add(self.story.pop(0))


def _story(rng: random.Random) -> list[str]:
    name, animal, look = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(_LOOKS)
    day, mood, place = rng.randrange(7), rng.choice(_MOODS), rng.choice(_PLACES)
    she = name in _IS_SHE
    who, whom, whose = ("she", "her", "her") if she else ("he", "him", "his")
    help_ = {
        "hungry": f"{name} gave the {animal} some {_FOOD[animal][1]} .",
        "thirsty": f"{name} gave the {animal} some water .",
        "tired": f"the {animal} slept under the tree .",
        "sad": f"{name} sang a song for the {animal} .",
        "cold": f"{name} made a warm fire for the {animal} .",
    }[mood]
    story = [
        f"on {DAYS[day]} {name} went to the {place} .",
        f"there {who} saw {'an' if look == 'old' else 'a'} {look} {animal} .",
        f"the {animal} was very {mood} .",
        help_,
        f"then the {animal} was happy .",
    ]
    endings = [
        f"the {look} {animal} followed {whom} home .",
        f"{who} told {whose} {rng.choice(_RELATIVES)} about the {look} {animal} .",
        f"{name} and the {animal} were good friends .",
        f"in the evening {who} went home .",
        f"the next day was {DAYS[(day + 1) % 7]} .",
    ]
    return story + [line for line in endings if rng.random() < 0.6]


def filler(writer: Writer, length: int) -> None:
    """Stories, rules, sums and copies until the document has `length` tokens or a little more."""
    while len(writer.doc) < length:
        draw = writer.rng.random()
        if draw < 0.06:
            writer.copy()
        elif draw < 0.14:
            writer.sum()
        elif draw < 0.24:
            writer.rule()
        else:
            writer.tell()


def document(seed: str, length: int) -> Document:
    """A training text of exactly `length` tokens, with its own density of facts and questions."""
    rng = random.Random(seed)
    writer = Writer(rng)
    mix = Mix(fact=rng.uniform(0.04, 0.30), query=rng.uniform(0.30, 0.65))
    if rng.random() < 0.6:  # many facts first, so that there are distant ones to ask for
        for _ in range(rng.randint(1, length // 24)):
            writer.fact()
    while len(writer.doc) < length:
        draw = rng.random()
        name = "story"
        for kind, share in vars(mix).items():
            draw -= share
            if draw < 0:
                name = kind
                break
        key = writer.distant_key() if name == "query" else None
        if key:
            writer.query(key, rng.random() < 0.12)
        elif name == "fact" and writer.free:
            writer.fact()
        elif name in ("copy", "sum", "rule"):
            getattr(writer, name)()
        else:
            writer.tell()
    return writer.doc.cut(length)


# ------------------------------------------------------------------------------ evaluation


def needle(seed: str, distance: int, others: int = 3) -> tuple[list[int], int, int]:
    """A prompt that ends in a question about a fact about `distance` tokens back.

    Returns the ids, the id of the value to answer, and the exact distance.

    `others` more facts stand between, at random places, to be told apart from the one asked for.
    """
    rng = random.Random(seed)
    writer = Writer(rng)
    filler(writer, 1 + rng.randrange(40))
    key = writer.fact()
    end = writer.where[key] + distance - 2  # `recall` and the key come before the answer
    last = max(end, len(writer.doc) + 1)
    places = sorted(rng.randrange(len(writer.doc), last) for _ in range(others))
    for place in places:
        if place + 16 < end:
            filler(writer, place)
            writer.fact()
    while end - len(writer.doc) > 16:
        filler(writer, len(writer.doc) + 1)
    _pad(writer, end - len(writer.doc))
    writer.query(key)
    value = len(writer.doc) - 2
    return writer.doc.ids[:value], writer.doc.ids[value], writer.doc.distances[value]


def _pad(writer: Writer, length: int) -> None:
    """About `length` tokens exactly: a count, which can have any length above four."""
    if length >= 5:
        writer.doc.add("count from 1 : " + " ".join(str(1 + i) for i in range(length - 5)) + " .")


PROMPTS = (
    "on monday anna went to the forest . there she saw a",
    "note maria 42 . note hugo 17 . recall maria",
    "note maria 42 . note hugo 17 . what is the code of hugo ?",
    "copy d e m o : ",
    "3 + 4 =",
    "the day after friday is",
    "all cats like",
    "count from 7 :",
)
