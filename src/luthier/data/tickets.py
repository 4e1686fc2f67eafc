"""Support-ticket mails and their JSON records, generated from a seed: the task of the quickstart.

A customer of a web shop writes about one purchase; the record says what the shop's software needs to know.
A mail is put together from frames (sentence templates): subject, problem, order and date, distractors
(numbers, dates and products that are not the ones asked for), urgency, request, signature, quoted reply. The
frames of a mail in their order are its template. A template belongs either to the training or to the test
mails, and so does a brand: no test mail is a training mail with other words in its slots.
`docs/tickets.md` describes the labels and the generator.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

from luthier.errors import DataError
from luthier.resources import explain

Split = Literal["train", "test"]

FIELDS = ("product", "category", "urgency", "order", "date", "action")
CATEGORIES = ("delivery", "defect", "wrong item", "missing parts", "billing")
URGENCIES = ("low", "normal", "high")
ACTIONS = ("refund", "replacement", "repair", "cancellation", "information", "callback")

INSTRUCTION = f"Turn this mail into JSON with {', '.join(FIELDS[:-1])} and {FIELDS[-1]}."

# How often a field is not in the mail; its value is then null (urgency: normal).
ABSENT = {"product": 0.12, "order": 0.15, "date": 0.2, "action": 0.12, "urgency": 0.4}

# A frame is text with {slots} and [choices|of|wording].

_PROBLEMS: dict[str, Sequence[str]] = {
    "delivery": (
        "My {product} has [still not|not yet] arrived.",
        "I am [still|] waiting for the {product}[ that you promised for last week|].",
        "The tracking page has not moved for [a week|ten days|days] and there is no sign of my {product}.",
        "[So far|Until today] no parcel with the {product} has reached me.",
        "The courier claims that he handed over the {product}, but [nothing came|nobody rang].",
        "Where is my {product}? The delivery [is overdue|should have come long ago].",
        "The parcel with the {product} seems to be lost [in the post|on its way].",
        "The {product} was meant to be here by now, but the postman brought nothing.",
        "The {product} went to [my old address|the wrong house] and I never got it.",
        "Shipping of the {product} is [taking far too long|very late].",
        "You said two days for the {product}; [it is two weeks now|I have waited much longer].",
        "The {product} has been stuck in your warehouse and was never sent out.",
    ),
    "defect": (
        "My {product} [stopped working|broke down] after [a week|two days|a month].",
        "The {product} does not [turn|switch] on[ any more|].",
        "The {product} makes a [loud|strange] noise and then [switches itself off|dies].",
        "My {product} has given up the ghost; pressing the button does nothing.",
        "There is a crack in the {product} and it [leaks|smells burnt].",
        "The {product} is [broken|faulty|defective].",
        "The {product} [gets far too hot|overheats] after [five|ten] minutes.",
        "Something inside the {product} is loose and it will not start.",
        "Since [Monday|last week] the {product} [only blinks|works only now and then].",
        "The [switch|motor|display] of my {product} is [dead|not working].",
        "The {product} failed on [its first day|the second use].",
        "When I plug in the {product}, it hums for a moment and goes dark.",
    ),
    "wrong item": (
        "I ordered the {product} but [got|received] something else.",
        "Instead of the {product} there was [a book|a pair of shoes|a garden hose] in the box.",
        "You sent [another model|the wrong colour|a different size] in place of the {product}.",
        "What came out of the parcel was not the {product} that I had chosen.",
        "The box says {product}, but inside is [a different article|somebody else's order].",
        "I wanted the {product} in [white|black|red] and you shipped [a blue|a green|an orange] one.",
        "This is not the {product} that I ordered.",
        "Somebody must have mixed up two parcels: I was sent a stranger's goods and not my {product}.",
        "The article in the parcel is not the {product}; [the label was mixed up|it is a cheaper one].",
        "Your warehouse packed the wrong thing when I ordered the {product}.",
        "[Wrong article|Wrong goods]: I was expecting the {product}.",
        "I paid for the {product} and unpacked quite another product.",
    ),
    "missing parts": (
        "The {product} came without [its cable|the power cord|its charger].",
        "The [lid|handle|manual|filter] is missing from the {product}.",
        "Some [screws|parts|pieces] of the {product} were not in the box.",
        "I unpacked the {product} and could not find the [plug|remote|battery] anywhere.",
        "The box of the {product} was incomplete: no [adapter|battery|stand].",
        "There should be two [filters|batteries|trays] with the {product}, but I found only one.",
        "The {product} is here, but the [accessories are|mounting kit is] missing.",
        "One of the [feet|knobs|brackets] of the {product} was left out of the package.",
        "You forgot to pack the [charger|lid|remote] of my {product}.",
        "My {product} was delivered without the [tray|cover|strap] shown in the picture.",
        "Not everything was in the parcel: the {product} lacks its [stand|hose|plug].",
        "Half of the accessories that belong to the {product} never got into the carton.",
    ),
    "billing": (
        "I was charged twice for the {product}.",
        "The invoice for the {product} shows [the wrong amount|a price that is too high].",
        "My discount was not taken off the price of the {product}.",
        "You debited my card two times although I bought only one {product}.",
        "You took [10|20|35] euros too much for the {product}.",
        "My card statement lists two payments for the {product}.",
        "The bill for my {product} [contains a fee that nobody mentioned|is wrong].",
        "The amount on my invoice for the {product} is higher than in the shop.",
        "I paid more for the {product} than [the offer said|your page stated].",
        "The voucher was ignored when I paid for the {product}.",
        "The payment for the {product} went [through twice|off at the full price].",
        "The coupon that I entered for the {product} does not show on the bill.",
    ),
}

_REQUESTS: dict[str, Sequence[str]] = {
    "refund": (
        "Please [send|give me] my money back.",
        "I would like a [full |]refund.",
        "Please [refund|pay back] the amount to my [card|account].",
        "I want to get my money returned.",
        "I want my money back[, nothing else|].",
        "Can you [reimburse me|refund me|repay me]?",
        "Kindly transfer the [price|money|sum] back to [me|my account].",
        "A refund to my card would settle this.",
    ),
    "replacement": (
        "Please send me a [new|proper] one.",
        "I would like a replacement.",
        "[Could|Can] you exchange it[ for the right one|]?",
        "Please send another one in exchange.",
        "Please [replace|exchange] it.",
        "I want [a new one|the correct one] instead.",
        "Kindly ship [another one|a substitute].",
        "I ask you for a new one as replacement.",
    ),
    "repair": (
        "[Can|Could] you [repair|fix] it?",
        "Please have it repaired.",
        "I would like to [send it in for repair|have it fixed].",
        "Can your workshop repair it?",
        "Where can I have it mended?",
        "Please [fix|mend] it[ under warranty|].",
        "I want your technicians to repair it.",
        "I would be glad if you fixed it.",
    ),
    "cancellation": (
        "Please cancel [the|my] order.",
        "I want to cancel.",
        "I no longer want it; [stop|cancel] the order.",
        "Kindly cancel the purchase.",
        "Consider the order cancelled.",
        "I withdraw from the purchase.",
        "[Cancel it|Please call the order off], I have bought one elsewhere.",
        "I hereby cancel this order.",
    ),
    "information": (
        "Please tell me [what is going on|where things stand].",
        "[Could|Can] you let me know what happens next?",
        "I would like to know [how this can be|the reason].",
        "Can you tell me what the matter is?",
        "Please inform me about [the status|the next steps].",
        "What [am I to do|is the state of things]?",
        "Can you explain [this|what happened]?",
        "Please let me know how things stand.",
    ),
    "callback": (
        "Please call me [back|on my mobile].",
        "[Can|Could] somebody [phone|ring|call] me?",
        "I would rather talk about it: please phone me [in the evening|after six|tomorrow].",
        "Please give me a ring[ tomorrow|].",
        "I [expect|ask for] a call from you.",
        "Give me a call[ in the morning| when you read this|].",
        "Please ring me, I do not like writing mails.",
        "I wish to be called back.",
    ),
}

# What a customer may sensibly ask for.
_ASKED = {
    "delivery": ("refund", "replacement", "cancellation", "information", "callback"),
    "defect": ("refund", "replacement", "repair", "callback", "information"),
    "wrong item": ("refund", "replacement", "callback", "information"),
    "missing parts": ("refund", "replacement", "callback", "cancellation"),
    "billing": ("refund", "information", "callback", "cancellation"),
}

_URGENCY: dict[str, Sequence[str]] = {
    "high": (
        "This is [very |really |]urgent.",
        "I need [it|this solved|an answer] [today|by tomorrow|at once].",
        "We need it for [a wedding|a birthday|an event] on {other_date}.",
        "Please hurry, this is urgent for me.",
        "It [cannot|can't] wait any longer.",
        "Please treat this as [urgent|a priority].",
        "[My shop|Our office|Our kitchen] stands still without it.",
        "I need a solution before {other_date}, please be quick.",
        "As [soon|fast] as possible, please!",
        "I leave on {other_date} and need this solved before.",
        "I must have [it|an answer] within [a day|24 hours|two days].",
        "It has to be solved immediately.",
    ),
    "low": (
        "There is no [hurry|rush].",
        "[This|It] is not urgent.",
        "Take your time[, I have another one|].",
        "I am in no hurry.",
        "It can wait [a few weeks|until next month].",
        "Whenever you [have a moment|get to it].",
        "No [hurry|rush] [at all|from my side].",
        "Take all the time you need, it is not urgent.",
        "You need not [hurry|answer at once].",
        "Answer when it suits you.",
        "I do not need it before [summer|next month].",
        "This can wait a while.",
    ),
}

_ORDER: Sequence[str] = (
    "My order number is {order}.",
    "Order {order}.",
    "You find it under order {order}.",
    "The number of my order is {order}.",
    "It is about order [no. |]{order}.",
    "The order number [on the slip |]is {order}.",
    "Order number: {order}.",
    "This concerns my order {order}.",
)
_DATE: Sequence[str] = (
    "I [bought|ordered] it on {date}.",
    "I placed the order on {date}.",
    "Date of purchase: {date}.",
    "It was ordered on {date}.",
    "I paid for it on {date}.",
    "The purchase was on {date}.",
    "I got it in your shop on {date}.",
    "The order dates from {date}.",
)
_ORDER_AND_DATE: Sequence[str] = (
    "I [bought|ordered] it on {date}, order {order}.",
    "Order {order} [of|from] {date}.",
    "I placed order {order} on {date}.",
    "It is order {order}, bought on {date}.",
    "My order number is {order}, the purchase was on {date}.",
    "On {date} I ordered it under number {order}.",
    "Order {order} was [made|placed] on {date}.",
    "The order is {order} and dates from {date}.",
)

# Numbers, dates and products that look like the ones asked for and are not.
_DISTRACTORS: Sequence[str] = (
    "My [last|earlier] order {other_order} was fine.",
    "My customer number is {number}.",
    "I already [called|wrote to] you on {other_date}.",
    "My former order {other_order} came without trouble.",
    "The {other_product} that I bought [from you|before] works well.",
    "Your colleague gave me ticket number {number}.",
    "I sent you photos on {other_date}.",
    "The customer number on my card is {number}.",
    "The tracking code is {number}.",
    "Do not mix it up with [the|my] {other_product}.",
    "Order {other_order} is another matter[ and already settled|].",
    "On {other_date} I talked to somebody of your team.",
    "The invoice has the number {number}.",
    "My neighbour has the {other_product} and is happy with it.",
    "You answered on {other_date} that you would look into it.",
    "I like the {other_product} that I got earlier.",
)
_QUOTES: Sequence[str] = (
    "> On {other_date} support wrote:\n> We have opened ticket {number} for you.",
    "> {other_date}: thank you for ordering the {other_product}.",
    "> From: shop, {other_date}\n> Ticket {number} is closed.",
    "> On {other_date} the shop wrote:\n> How do you like the {other_product}?",
)

_SUBJECTS: Sequence[str] = (
    "Subject: {product}",
    "Subject: order {order}",
    "Subject: [question|problem|complaint|my purchase]",
    "Subject: your {product}",
    "Subject: [problem with|about] the {product}",
    "Subject: order no. {order}",
    "Subject: [help|please read|to the service team]",
    "Subject: concerning order {order}",
)
_GREETINGS: Sequence[str] = (
    "Hello,",
    "Hi,",
    "Dear team,",
    "Good day,",
    "Hi there,",
    "Hello team,",
    "",
    "Dear all,",
)
_OPENERS: Sequence[str] = (
    "I hope you are well.",
    "I am a [loyal|long-time] customer.",
    "[Sorry to bother you.|I have a problem.]",
    "I have been your customer for years.",
    "This is my first [complaint|mail to you].",
    "I am [rather|a little] disappointed.",
    "Thank you for your good service so far.",
    "I am not happy at the moment.",
)
_CLOSINGS: Sequence[str] = (
    "Best regards,\n{name}", "Thanks, {name}", "{name}", "Regards, {name}",
    "Kind regards\n{name}\nTel. {phone}", "Yours, {name}", "Thank you!\n{name}, {city}",
    "Many thanks\n{name}\nPhone {phone}",
)  # fmt: skip
_UNNAMED = ("item", "article", "product", "thing")  # how a mail speaks of a product that it does not name

_BRANDS = (
    "Norvik", "Aero", "Lumio", "Kestrel", "Velo", "Tamaro", "Brixen", "Orla", "Zephyr", "Pallas", "Quill",
    "Hanno", "Mirado", "Solva", "Tundra", "Fenwick", "Castor", "Ilmari", "Rondo", "Juno", "Vesta", "Kobalt",
    "Nimbus", "Arvika", "Delphi", "Sorrel", "Mistral", "Opal", "Tessa", "Garda", "Ember", "Lyra", "Boreal",
    "Cirrus", "Halden", "Marlow", "Petrel", "Savona", "Tiber", "Umbra",
)  # fmt: skip
_MODELS = ("", "", "", "{n}", "{n}00", "X{n}", "Pro", "Mini", "Plus", "S{n}", "Max", "{n}0")
_KINDS = (
    "coffee maker", "kettle", "toaster", "blender", "vacuum cleaner", "desk lamp", "headphones", "keyboard",
    "monitor", "printer", "router", "fan", "heater", "iron", "hair dryer", "shaver", "camera", "speaker",
    "tablet", "drill", "lawn mower", "bicycle pump", "tent", "backpack", "office chair", "bookshelf",
    "mattress", "clock radio", "scale", "mixer", "air fryer", "dishwasher", "freezer", "microwave", "webcam",
)  # fmt: skip
_FIRST = ("Anna", "Ben", "Clara", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kate", "Liam",
          "Maya", "Nils", "Olga", "Paul", "Rosa", "Sven", "Tara", "Yusuf")  # fmt: skip
_LAST = ("Meyer", "Novak", "Olsen", "Patel", "Quinn", "Rossi", "Silva", "Tanaka", "Weber", "Young", "Adams",
         "Brandt", "Costa", "Dubois", "Evans", "Fischer")  # fmt: skip
_CITIES = ("Bergen", "Leeds", "Graz", "Porto", "Lyon", "Turin", "Gent", "Malmö")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Ticket:
    """A mail, the record that it holds, and its template: the frames that it was made of, in order."""

    mail: str
    record: dict[str, Any]
    frames: tuple[str, ...]

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The row of the data set: a chat whose answer is compact JSON, its keys in the order of FIELDS."""
        answer = json.dumps(self.record, ensure_ascii=False, separators=(",", ":"))
        turns = {"system": INSTRUCTION, "user": self.mail, "assistant": answer}
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def write(folder: str | Path, seed: int = 0, train: int = 1000, test: int = 100) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl, rows of {messages}; returns their paths.

    The same seed gives the same files on every machine, and more rows only add to fewer.

    Raises:
        DataError: a count below 1.
        ResourceError: the folder cannot be written.
    """
    counts: dict[Split, int] = {"train": train, "test": test}
    for split, count in counts.items():
        if count < 1:
            raise DataError(f"{split} is {count}.", fix="Ask for at least one mail.")
    folder = Path(folder)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in counts.items():
            rows = (ticket.row() for ticket in tickets(split, count, seed))
            path = folder / f"{split}.jsonl"
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
            paths.append(path)
    except OSError as error:
        raise explain(error, folder, fix="Choose another folder.") from error
    return paths[0], paths[1]


def tickets(split: Split, count: int, seed: int = 0) -> Iterator[Ticket]:
    """`count` different tickets whose templates and brands belong to a split."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        ticket = _Writer(random.Random(f"tickets/{seed}/{split}/{index}"), split).ticket()
        index += 1
        if split_of(ticket.frames) == split and ticket.mail not in seen:
            seen.add(ticket.mail)
            yield ticket


def split_of(frames: tuple[str, ...]) -> Split:
    """The split that a template (the frames of a mail in order) belongs to: one in four is for the test."""
    return "test" if zlib.crc32("\n".join(frames).encode()) % 4 == 3 else "train"


def brands(split: Split) -> list[str]:
    """Every fourth brand is for the test, the others for training."""
    return [brand for i, brand in enumerate(_BRANDS) if (i % 4 == 3) == (split == "test")]


@dataclass
class _Writer:
    """Puts one ticket together. Random draws come in a fixed order from `rng`."""

    rng: random.Random
    split: Split
    frames: list[str] = field(default_factory=list)

    def ticket(self) -> Ticket:
        record = self._record()
        slots = self._slots(record)
        parts = self._body(record)
        text = " ".join(self._fill(part, slots) for part in parts)
        lines = [self._pick(_GREETINGS), text, self._fill(self._pick(_CLOSINGS), slots)]
        if self.rng.random() < 0.5 and (frame := self._subject(record)):
            lines.insert(0, self._fill(frame, slots))
        if self.rng.random() < 0.15:
            lines.append(self._fill(self._pick(_QUOTES), slots))
        return Ticket("\n".join(line for line in lines if line), record, tuple(self.frames))

    def _record(self) -> dict[str, Any]:
        rng = self.rng
        category = rng.choice(CATEGORIES)
        values: dict[str, Any] = {
            "product": self._product(),
            "category": category,
            "urgency": rng.choice(("low", "high")),
            "order": self._order_number(),
            "date": self._day().isoformat(),
            "action": rng.choice(_ASKED[category]),
        }
        for name, share in ABSENT.items():
            if rng.random() < share:
                values[name] = "normal" if name == "urgency" else None
        return values

    def _slots(self, record: dict[str, Any]) -> dict[str, str]:
        rng = self.rng
        other = self._product()
        while other.split()[0] == (record["product"] or "").split(" ")[0]:
            other = self._product()
        return {
            "product": record["product"] or rng.choice(_UNNAMED),
            "order": record["order"] or "",
            "date": self._written(date.fromisoformat(record["date"])) if record["date"] else "",
            "other_product": other,
            "other_order": self._order_number(),
            "other_date": self._written(self._day()),
            "number": rng.choice(("{}", "K{}", "T-{}")).format(rng.randrange(10_000, 1_000_000)),
            "name": f"{rng.choice(_FIRST)} {rng.choice(_LAST)}" if rng.random() < 0.5 else rng.choice(_FIRST),
            "phone": f"0{rng.randrange(100, 999)} {rng.randrange(10_000, 999_999)}",
            "city": rng.choice(_CITIES),
        }

    def _body(self, record: dict[str, Any]) -> list[str]:
        """Sentences in one of the orders in which people write."""
        rng = self.rng
        problem = self._pick(_PROBLEMS[record["category"]])
        facts = self._facts(record)
        if rng.random() < 0.55:
            facts.insert(rng.randrange(len(facts) + 1), self._pick(_DISTRACTORS))
        end = [self._pick(_URGENCY[record["urgency"]])] if record["urgency"] != "normal" else []
        if record["action"]:
            end.insert(rng.randrange(len(end) + 1), self._pick(_REQUESTS[record["action"]]))
        body = [problem, *facts, *end] if rng.random() < 0.75 else [*facts, problem, *end]
        return [self._pick(_OPENERS), *body] if rng.random() < 0.25 else body

    def _facts(self, record: dict[str, Any]) -> list[str]:
        if record["order"] and record["date"] and self.rng.random() < 0.5:
            return [self._pick(_ORDER_AND_DATE)]
        facts = [self._pick(_ORDER)] if record["order"] else []
        if record["date"]:
            facts.insert(self.rng.randrange(len(facts) + 1), self._pick(_DATE))
        return facts

    def _subject(self, record: dict[str, Any]) -> str | None:
        frame = self.rng.choice(_SUBJECTS)
        if ("{product}" in frame and not record["product"]) or ("{order}" in frame and not record["order"]):
            return None
        self.frames.append(frame)
        return frame

    def _pick(self, entries: Sequence[str]) -> str:
        frame = self.rng.choice(entries)
        if frame:
            self.frames.append(frame)
        return frame

    def _fill(self, frame: str, slots: dict[str, str]) -> str:
        chosen = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), frame)
        return re.sub(r"  +", " ", chosen.format(**slots))

    def _product(self) -> str:
        rng = self.rng
        brand = rng.choice(brands(self.split))
        model = rng.choice(_MODELS).format(n=rng.randrange(2, 10))
        return " ".join(part for part in (brand, model, rng.choice(_KINDS)) if part)

    def _order_number(self) -> str:
        rng = self.rng
        digits = str(rng.randrange(10_000, 1_000_000))
        return (
            rng.choice(("", "", f"{rng.choice('ABCDEFGHKLMNPRSTVW')}-", f"{rng.choice('ABDFGHKMNPRTW')}"))
            + digits
        )

    def _day(self) -> date:
        return date(2024, 1, 1) + timedelta(days=self.rng.randrange(731))

    def _written(self, day: date) -> str:
        month = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
                 "October", "November", "December")[day.month - 1]  # fmt: skip
        return self.rng.choice(
            (
                f"{day.day} {month} {day.year}",
                f"{month} {day.day}, {day.year}",
                f"{day.day} {month[:3]} {day.year}",
                f"{day.day:02d}.{day.month:02d}.{day.year}",
                day.isoformat(),
            )
        )
