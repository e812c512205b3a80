"""Write data/tasks.jsonl, the default data set: 800 short synthetic rows that a small model fails and a LoRA learns.

    python data/make_tasks.py               # writes data/tasks.jsonl, the same bytes every time
    python data/make_tasks.py --out FILE

There are six categories; five of them have exactly one correct answer. Train and test rows share the tasks and their
wordings, but no name, item, city, device, date, number or message: each pool below has a train and a test half, and
tests/test_tasks.py checks every row. The pools are ordinary words, most of them one token long for SmolLM2, since the
default training must fit in a few minutes on two CPU cores.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 2031
TASKS = Path(__file__).with_name("tasks.jsonl")


def _words(text: str) -> list[str]:
    return text.split("|") if "|" in text else text.split()


# kind: (train, test)
WORDS = {
    "first name": (
        "Anna Ben Carl Dana Emma Frank Grace Henry Ivan Jack Kate Leo Maria Oscar Paul Ruth Sam Tom Victor Walter "
        "Alice Clara David Ella George Helen Jane Lucy Martin Nina Peter Simon Adam Julia Max Sara Will Mark Alan "
        "Diana Eric Ian Linda Oliver",
        "Rosa Eva Iris Vera Beth Chris Gary Hannah Joan Karl Michael Nancy Patrick Rachel Steve",
    ),
    "last name": (
        "Adams Clark Davis Evans Gray Hill Jones King Lewis Moore Nash Price Reed Stone Turner Webb Young Allen "
        "Brown Cooper Ellis Ford Green Hunt Lane Parker Scott Taylor Wood Bell Carter Grant Harris Kelly Mills "
        "Ross Ward",
        "Fisher Owen Knight Mason Dixon Foster Long Perry Shaw West Baker Murphy",
    ),
    "city": (
        "Oslo Paris Rome Lima Cairo Delhi Tokyo Berlin Madrid Vienna Athens Boston Denver Quebec Seoul Milan Lyon Bern "
        "Geneva Perth London Moscow Hamburg Naples Manila Toronto Chicago Dallas Miami Leeds",
        "Nairobi Bonn Venice Seattle Glasgow Sydney Dublin Prague Houston Munich Dubai Warsaw",
    ),
    "item": (
        "lamps chairs books pens cups bowls plates knives forks spoons hats coats shoes socks gloves bags boxes "
        "bottles candles mirrors clocks pillows blankets towels ropes nails brushes buckets bells balls tents",
        "maps flags stamps rings ribbons pots pans jars tiles desks helmets bikes",
    ),
    "device": (
        "kettle router printer heater fan radio camera speaker blender freezer dryer vacuum monitor keyboard modem "
        "scanner projector tablet phone watch drone robot pump mixer grill stove charger",
        "oven boiler alarm microphone microscope toaster thermostat sensor doorbell iron",
    ),
    "colour": ("red green blue white black yellow grey", "orange purple pink violet"),
    "cleaner": ("water soap vinegar alcohol bleach foam", "lemon salt oil ammonia"),
    "gift": (
        "cake tea honey wine cheese soup bread jam poster plant painting puzzle novel sweater scarf vase basket guitar",
        "pie chocolate coffee necklace bracelet violin butter album",
    ),
    "job": (
        "nurse pilot doctor teacher lawyer farmer waiter dentist judge chef actor poet plumber painter miner clerk",
        "writer sailor banker soldier singer dancer gardener",
    ),
    "instrument": ("piano cello harp trumpet organ drums lute horn", "banjo clarinet saxophone accordion"),
    "place": (
        "North|River|Harbor|Royal|Castle|Forest|Summer|Marble|Silver|Crystal|Central|Ocean|Star|Bridge",
        "Golden|Maple|Desert|Winter|Eagle|Lake",
    ),
    "building": ("Museum|Theater|Gallery|Library|Zoo|Tower|Aquarium", "Stadium|Palace|Opera|Market"),
    # Messages to a help desk: a subject and a problem, by label.
    "billing subject": (
        "My invoice|The last bill|Your charge|The monthly fee|The payment|The refund",
        "My receipt|The tax|The price",
    ),
    "billing problem": (
        "is too high|has the wrong total|was taken twice|shows extra costs|is not what we agreed",
        "doubled since May|lists a wrong amount|should cost me less",
    ),
    "delivery subject": (
        "My parcel|The package|The courier|My shipment|The truck|My order",
        "The mail|My crate|The van",
    ),
    "delivery problem": (
        "is three days late|never came|went to the wrong street|was sent to my old address|is still on the way",
        "did not arrive|stopped at another house|is stuck at the border",
    ),
    "login subject": (
        "My password|My account|The sign-in page|My username|The code|My session",
        "My PIN|The access key|My profile",
    ),
    "login problem": (
        "is not accepted|is locked|does not let me in|was reset|has expired",
        "keeps being denied|got blocked|cannot be verified",
    ),
    "repair subject": (
        "The screen|The motor|The handle|The hinge|The battery|The wheel",
        "The lid|The zipper|The lens",
    ),
    "repair problem": (
        "is cracked|makes a noise|came loose|no longer turns|is bent",
        "broke in two|has a scratch|fell off",
    ),
}
LABELS = ["billing", "delivery", "login", "repair"]
MONTHS = _words("January February March April May June July August September October November December")

# category: (train rows, test rows)
SIZES = {
    "information_extraction": (120, 30),
    "rewriting": (120, 30),
    "classification": (112, 28),
    "closed_qa": (112, 28),
    "procedure": (112, 28),
    "creative_writing": (64, 16),
}


@dataclass(frozen=True)
class Task:
    """One row, and the entities it is made of, as {kind: value}. The splits must not share entities."""

    instruction: str
    context: str
    response: str
    category: str
    split: str
    entities: dict[str, str]

    def row(self) -> dict[str, str]:
        return {
            "instruction": self.instruction,
            "context": self.context,
            "response": self.response,
            "category": self.category,
            "split": self.split,
        }


class Pools:
    """The words and numbers of one split. Each kind is dealt like a pack of cards: all words before any repeats."""

    def __init__(self, split: str, rng: random.Random) -> None:
        half = ("train", "test").index(split)
        self.rng = rng
        self.values = {kind: _words(halves[half]) for kind, halves in WORDS.items()}
        # 6, 7, 14, 15, 22, 23, … are test numbers, so both splits have small and large, odd and even ones.
        mine = [n for n in range(2, 2025) if (n // 2 % 4 == 3) == (split == "test")]
        self.values["quantity"] = [str(n) for n in mine if n < 100]
        self.values["seconds"] = [str(n) for n in mine if n <= 60]
        self.values["minutes"] = [str(n) for n in mine if n <= 60]
        self.values["euros"] = [str(n) for n in mine if n <= 40]
        self.values["year"] = [str(n) for n in mine if n >= 1950]
        self.decks: dict[str, Iterator[str]] = {kind: self._deck(values) for kind, values in self.values.items()}

    def _deck(self, values: list[str]) -> Iterator[str]:
        while True:
            yield from self.rng.sample(values, len(values))

    def deal(self, kind: str) -> str:
        return next(self.decks[kind])


# Each function below draws one row of its category: (instruction, context, response, entities).
Drawn = tuple[str, str, str, dict[str, str]]


def information_extraction(pools: Pools) -> Drawn:
    name, item, qty, city = (pools.deal(kind) for kind in ("first name", "item", "quantity", "city"))
    instruction = pools.rng.choice(["Order to JSON.", "Give the order as JSON.", "Extract the order as JSON."])
    context = pools.rng.choice(
        [
            f"{name} orders {qty} {item} to {city}.",
            f"Please send {qty} {item} to {name} in {city}.",
            f"{qty} {item} for {name}, {city}.",
        ]
    )
    response = json.dumps({"name": name, "item": item, "qty": int(qty), "city": city}, separators=(",", ":"))
    return instruction, context, response, {"first name": name, "item": item, "quantity": qty, "city": city}


def rewriting(pools: Pools) -> Drawn:
    if pools.rng.random() < 1 / 3:
        first, last = pools.deal("first name"), pools.deal("last name")
        rule = pools.rng.choice(["Write as Last, F.:", "Rewrite as Last, F.:"])
        return f"{rule} {first} {last}", "", f"{last}, {first[0]}.", {"first name": first, "last name": last}
    year, month, day = pools.deal("year"), pools.rng.randint(1, 12), pools.rng.randint(1, 28)
    name = MONTHS[month - 1]
    date = pools.rng.choice([f"{day} {name} {year}", f"{name} {day}, {year}", f"{name[:3]} {day} {year}"])
    rule = pools.rng.choice(["Write as YYYY-MM-DD:", "Rewrite as YYYY-MM-DD:"])
    iso = f"{year}-{month:02}-{day:02}"
    return f"{rule} {date}", "", iso, {"year": year, "date": iso}


def classification(pools: Pools) -> Drawn:
    label = pools.rng.choice(LABELS)
    subject, problem = pools.deal(f"{label} subject"), pools.deal(f"{label} problem")
    *some, last = pools.rng.sample(LABELS, len(LABELS))
    names = f"{', '.join(some)} or {last}"
    instruction = pools.rng.choice([f"Which label: {names}?", f"Label as {names}."])
    return instruction, f"{subject} {problem}.", label, {f"{label} subject": subject, f"{label} problem": problem}


def closed_qa(pools: Pools) -> Drawn:
    city = pools.deal("city")
    if pools.rng.random() < 0.5:
        place, building, year, euros = (pools.deal(kind) for kind in ("place", "building", "year", "euros"))
        context = pools.rng.choice(
            [
                f"The {place} {building} in {city} opened in {year}. A ticket is {euros} euros.",
                f"For {euros} euros you can visit the {place} {building} in {city}, open since {year}.",
            ]
        )
        entities = {"place": place, "building": building, "city": city, "year": year, "euros": euros}
        answers = {"When did it open?": year, "Where is it?": city, "How much is it?": f"{euros} euros"}
    else:
        name, job, instrument = (pools.deal(kind) for kind in ("first name", "job", "instrument"))
        context = pools.rng.choice(
            [
                f"{name}, a {job} from {city}, plays the {instrument}.",
                f"In {city} lives {name}, who plays the {instrument} and works as a {job}.",
            ]
        )
        entities = {"first name": name, "job": job, "city": city, "instrument": instrument}
        answers = {"Which job?": job, "Which city?": city, "Which instrument?": instrument}
    question = pools.rng.choice(list(answers))
    return question, context, answers[question], entities


def procedure(pools: Pools) -> Drawn:
    device = pools.deal("device")
    if pools.rng.random() < 0.5:
        colour, seconds = pools.deal("colour"), pools.deal("seconds")
        task = pools.rng.choice(["Steps to reset the", "How to reset the"])
        response = f"1. Unplug the {device}.\n2. Wait {seconds} s.\n3. Press the {colour} button."
        entities = {"device": device, "colour": colour, "seconds": seconds}
        return f"{task} {device}: {colour} button, {seconds} s", "", response, entities
    cleaner, minutes = pools.deal("cleaner"), pools.deal("minutes")
    task = pools.rng.choice(["Steps to clean the", "How to clean the"])
    response = f"1. Turn off the {device}.\n2. Wipe it with {cleaner}.\n3. Dry it for {minutes} min."
    entities = {"device": device, "cleaner": cleaner, "minutes": minutes}
    return f"{task} {device}: {cleaner}, {minutes} min", "", response, entities


def creative_writing(pools: Pools) -> Drawn:
    """The only open category: several answers are correct, so exact match means little here."""
    name, gift = pools.deal("first name"), pools.deal("gift")
    instruction = pools.rng.choice(
        [f"Thank {name} for the {gift}.", f"Write a thank-you note to {name} for the {gift}."]
    )
    response = pools.rng.choice(
        [
            f"Dear {name}, thank you so much for the {gift}!",
            f"Dear {name}, the {gift} made my day. Thank you!",
            f"Dear {name}, I really love the {gift}. Many thanks!",
        ]
    )
    return instruction, "", response, {"first name": name, "gift": gift}


DRAW: dict[str, Callable[[Pools], Drawn]] = {
    "information_extraction": information_extraction,
    "rewriting": rewriting,
    "classification": classification,
    "closed_qa": closed_qa,
    "procedure": procedure,
    "creative_writing": creative_writing,
}


def generate() -> list[Task]:
    """All rows with their entities, in the order of the file. No two rows have the same instruction and context."""
    rng = random.Random(SEED)
    tasks = []
    for half, split in enumerate(("train", "test")):
        pools = Pools(split, rng)
        for category, draw in DRAW.items():
            seen: set[Any] = set()
            while len(seen) < SIZES[category][half]:
                instruction, context, response, entities = draw(pools)
                # Another order of the labels in the instruction does not make a new message, so compare the entities.
                key = tuple(entities.values()) if category == "classification" else (instruction, context)
                if key not in seen:
                    seen.add(key)
                    tasks.append(Task(instruction, context, response, category, split, entities))
    rng.shuffle(tasks)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description="write the default data set")
    parser.add_argument("--out", type=Path, default=TASKS, help="default: %(default)s")
    out = parser.parse_args().out
    tasks = generate()
    out.write_text("".join(json.dumps(task.row(), ensure_ascii=False) + "\n" for task in tasks), encoding="utf-8")
    print(f"{out}: {len(tasks)} rows")


if __name__ == "__main__":
    main()
