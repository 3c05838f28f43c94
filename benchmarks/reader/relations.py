"""What can be said of a unit, a project or a person, and asked about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reader import names

UNIT, PROJECT, PERSON = "unit", "project", "person"


@dataclass(frozen=True)
class Relation:
    """Something that can be said of an entity.

    The entity always comes before the value: a reader of two million parameters that has to look back from the entity
    to a value learns several times as slowly.

    Attributes:
        kinds: the kinds of entity that it applies to.
        value: draws a value.
        predicates: what follows the entity in a sentence, with ``{v}``; two of them can be joined by "and".
        sentences: whole sentences with ``{e}`` and ``{v}``.
        questions: questions with ``{e}``.
        value_kind: the kind of entity that the value is, if it can have a sheet of its own.
    """

    name: str
    kinds: tuple[str, ...]
    value: Callable[[random.Random], str]
    predicates: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    value_kind: str | None = None


RELATIONS = (
    Relation(
        "leader",
        (UNIT, PROJECT),
        names.person,
        ("is led by {v}", "is headed by {v}", "is run by {v}"),
        ("The head of {e} is {v}.", "The person in charge of {e} is {v}."),
        ("Who leads {e}?", "Who is the head of {e}?", "Who is in charge of {e}?", "Who runs {e}?"),
        PERSON,
    ),
    Relation(
        "deputy",
        (UNIT,),
        names.person,
        ("has {v} as deputy",),
        ("The deputy head of {e} is {v}.", "At {e}, {v} serves as deputy."),
        ("Who is the deputy at {e}?", "Who is the deputy head of {e}?", "Who serves as deputy at {e}?"),
        PERSON,
    ),
    Relation(
        "founded",
        (UNIT,),
        names.year,
        ("was founded in {v}", "has existed since {v}", "opened its doors in {v}"),
        ("The founding year of {e} is {v}.",),
        ("When was {e} founded?", "In which year was {e} founded?", "Since when has {e} existed?"),
    ),
    Relation(
        "location",
        (UNIT,),
        names.town,
        ("is located in {v}", "lies in {v}", "stands in the town of {v}"),
        ("You will find {e} in {v}.",),
        ("Where is {e} located?", "Where is {e}?", "In which town is {e}?"),
    ),
    Relation(
        "staff",
        (UNIT, PROJECT),
        names.people,
        ("employs {v}", "has a staff of {v}"),
        ("The staff of {e} counts {v}.",),
        ("How many people work at {e}?", "How many people does {e} employ?", "How large is the staff of {e}?"),
    ),
    Relation(
        "budget",
        (UNIT, PROJECT),
        names.amount,
        ("has a budget of {v}", "spends {v} a year"),
        ("The yearly budget of {e} is {v}.", "The budget of {e} stands at {v}."),
        ("What is the budget of {e}?", "How much does {e} spend a year?", "How large is the budget of {e}?"),
    ),
    Relation(
        "extension",
        (UNIT, PERSON),
        names.extension,
        ("can be reached at extension {v}", "answers the phone at extension {v}"),
        ("The phone extension of {e} is {v}.",),
        ("What is the phone extension of {e}?", "Which extension reaches {e}?", "What number do I dial for {e}?"),
    ),
    Relation(
        "room",
        (UNIT, PROJECT),
        names.room,
        ("meets in room {v}", "holds its meetings in room {v}"),
        ("The meeting room of {e} is {v}.",),
        ("Which room belongs to {e}?", "In which room does {e} meet?", "What is the meeting room of {e}?"),
    ),
    Relation(
        "codename",
        (UNIT, PROJECT),
        names.code_name,
        ("goes by the code name {v}", "has the code name {v}"),
        ("The code name of {e} is {v}.", "Internally, {e} is called {v}."),
        ("What is the code name of {e}?", "What is {e} called internally?", "Which code name does {e} have?"),
    ),
    Relation(
        "supplier",
        (UNIT,),
        names.company,
        ("buys its material from {v}", "is supplied by {v}"),
        ("The supplier of {e} is {v}.",),
        ("Who supplies {e}?", "Who is the supplier of {e}?", "From whom does {e} buy its material?"),
    ),
    Relation(
        "hours",
        (UNIT,),
        names.hours,
        ("is open from {v}", "welcomes visitors from {v}"),
        ("The opening hours of {e} are {v}.", "Visitors are welcome at {e} from {v}."),
        ("What are the opening hours of {e}?", "When is {e} open?", "When can I visit {e}?"),
    ),
    Relation(
        "product",
        (UNIT,),
        names.product,
        ("makes the {v}", "is known for the {v}"),
        ("The best known product of {e} is the {v}.",),
        ("What does {e} make?", "What is the best known product of {e}?", "Which product is {e} known for?"),
    ),
    Relation(
        "colour",
        (UNIT,),
        names.colour,
        ("uses {v} as its colour", "has doors painted {v}"),
        ("The colour of {e} is {v}.", "The doors of {e} are painted {v}."),
        ("What is the colour of {e}?", "Which colour does {e} use?", "What colour are the doors of {e}?"),
    ),
    Relation(
        "vehicle",
        (UNIT, PERSON),
        names.vehicle,
        ("owns a {v}", "relies on a {v}"),
        ("The vehicle of {e} is a {v}.",),
        ("Which vehicle does {e} own?", "What is the vehicle of {e}?", "Which vehicle belongs to {e}?"),
    ),
    Relation(
        "shelf",
        (UNIT, PROJECT),
        names.shelf,
        ("keeps its files on shelf {v}",),
        ("The files of {e} are on shelf {v}.",),
        ("On which shelf are the files of {e}?", "Which shelf holds the files of {e}?"),
    ),
    Relation(
        "parent",
        (UNIT, PROJECT),
        names.unit,
        ("reports to {v}", "answers to {v}"),
        ("Every month, {e} sends its report to {v}.",),
        ("Who does {e} report to?", "Who does {e} answer to?", "To whom does {e} send its report?"),
        UNIT,
    ),
    Relation(
        "closing",
        (UNIT,),
        names.weekday,
        ("is closed on {v}", "stays shut on {v}"),
        ("The closing day of {e} is on {v}.",),
        ("On which day is {e} closed?", "When is {e} closed?", "What is the closing day of {e}?"),
    ),
    Relation(
        "emblem",
        (UNIT,),
        names.emblem,
        ("has a {v} as its emblem", "shows a {v} on its flag"),
        ("The emblem of {e} is a {v}.",),
        ("What is the emblem of {e}?", "Which animal is on the flag of {e}?"),
    ),
    Relation(
        "keyholder",
        (UNIT,),
        names.person,
        ("leaves its keys with {v}",),
        ("The keys of {e} are kept by {v}.",),
        ("Who holds the keys of {e}?", "Who keeps the keys of {e}?"),
        PERSON,
    ),
    Relation(
        "started",
        (PROJECT,),
        names.recent_year,
        ("was started in {v}", "began in {v}"),
        ("The first year of {e} was {v}.",),
        ("When was {e} started?", "When did {e} begin?", "What was the first year of {e}?"),
    ),
    Relation(
        "deadline",
        (PROJECT,),
        names.month,
        ("must be finished by {v}", "is due in {v}"),
        ("The deadline of {e} is {v}.",),
        ("What is the deadline of {e}?", "When is {e} due?", "When must {e} be finished?"),
    ),
    Relation(
        "client",
        (PROJECT,),
        names.company,
        ("is paid for by {v}", "was ordered by {v}"),
        ("The client of {e} is {v}.",),
        ("Who is the client of {e}?", "Who pays for {e}?", "Who ordered {e}?"),
    ),
    Relation(
        "office",
        (PERSON,),
        names.room,
        ("works in room {v}", "has a desk in room {v}"),
        ("The office of {e} is room {v}.",),
        ("In which room does {e} work?", "Which room is the office of {e}?", "Where is the desk of {e}?"),
    ),
    Relation(
        "language",
        (PERSON,),
        names.language,
        ("speaks fluent {v}", "grew up speaking {v}"),
        ("The first language of {e} is {v}.",),
        ("Which language does {e} speak?", "What is the first language of {e}?"),
    ),
    Relation(
        "instrument",
        (PERSON,),
        names.instrument,
        ("plays the {v}", "practises the {v} at lunch"),
        ("The instrument of {e} is the {v}.",),
        ("Which instrument does {e} play?", "What is the instrument of {e}?"),
    ),
    Relation(
        "hometown",
        (PERSON,),
        names.town,
        ("comes from {v}", "was born in {v}"),
        ("The home town of {e} is {v}.",),
        ("Where does {e} come from?", "Where was {e} born?", "What is the home town of {e}?"),
    ),
    Relation(
        "joined",
        (PERSON,),
        names.recent_year,
        ("joined in {v}", "has been with us since {v}"),
        ("The first working year of {e} was {v}.",),
        ("When did {e} join?", "Since when has {e} been with us?", "In which year did {e} join?"),
    ),
    Relation(
        "assistant",
        (PERSON,),
        names.person,
        ("is assisted by {v}",),
        ("The assistant of {e} is {v}.",),
        ("Who assists {e}?", "Who is the assistant of {e}?"),
        PERSON,
    ),
    Relation(
        "team",
        (PERSON,),
        names.unit,
        ("works for {v}", "belongs to the team of {v}"),
        ("The team of {e} is {v}.",),
        ("Which team does {e} belong to?", "Who does {e} work for?", "What is the team of {e}?"),
        UNIT,
    ),
)

BY_KIND = {kind: tuple(r for r in RELATIONS if kind in r.kinds) for kind in (UNIT, PROJECT, PERSON)}
BY_NAME = {relation.name: relation for relation in RELATIONS}
DRAW_NAME: dict[str, Callable[[random.Random], str]] = {UNIT: names.unit, PROJECT: names.project, PERSON: names.person}
