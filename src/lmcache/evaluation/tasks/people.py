"""Portraits: passages about a person."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from lmcache.evaluation.tasks import words
from lmcache.evaluation.tasks.draw import endless, spread
from lmcache.evaluation.tasks.passage import write_passage

_LEADS: Final = (
    "{name} is a {job} from {town}.",
    "Born in {town}, {name} has worked as a {job} for most of {his} life.",
    "{name}, a {job}, grew up in {town}.",
)
_WORKPLACES: Final = (
    "{He} works at the {workplace}.",
    "For some years now {he} has been employed by the {workplace}.",
    "On weekdays {he} can be found at the {workplace}, where {he} has a small office.",
)
_INSTRUMENTS: Final = (
    "In the evenings {surname} plays the {instrument}.",
    "{He} plays the {instrument} in an amateur orchestra.",
    "{His} neighbours know {surname} by the sound of the {instrument}, which {he} plays every Sunday.",
)
_PETS: Final = ("At home {he} keeps {pet}.", "{He} shares the house with {pet}.", "{He} would never part with {pet}.")
_DISHES: Final = (
    "Guests are always served {dish}.",
    "{His} favourite meal is {dish}.",
    "Nobody in the street makes better {dish}.",
)
_TEACHERS: Final = (
    "{He} learned the trade from {teacher}.",
    "{His} teacher was {teacher}, whom {he} still visits.",
    "As a student {he} was taught by {teacher}.",
)
_ASIDES: Final = (
    "{surname} gets up before six and walks to work whatever the weather.",
    "Colleagues describe {surname} as patient, a little shy, and very hard to hurry.",
    "{He} writes long letters by hand and answers every one that {he} receives.",
    "The garden behind the house is full of roses that {he} planted long ago.",
    "{He} has never learned to drive and says that {he} does not miss it.",
    "A drawer in the kitchen holds all the notebooks that {he} has filled since school.",
    "Last winter {he} gave a talk about {his} profession, and the hall was full.",
    "{He} reads the newspaper from the last page to the first.",
    "When something breaks, {he} repairs it rather than buying a new one.",
    "{surname} dislikes telephones and prefers to meet people in person.",
    "Friends say that {he} remembers every birthday and forgets every umbrella.",
    "{His} bicycle is older than most of the people {he} works with.",
    "{He} once missed the last train and spent the night talking to the station master.",
    "On the wall of the study hangs a faded photograph of a mountain hut.",
    "{He} hopes to retire in a few years and to travel slowly by boat.",
    "The children next door come to {him} with their homework, and {he} is glad to help.",
    "{surname} collects stones from beaches and labels each with a date.",
    "{surname} gave up smoking on a Tuesday and has counted the Tuesdays ever since.",
    "Every spring {he} paints the fence, and every autumn {he} regrets the colour.",
    "A nephew sends postcards from far away, and {he} pins them above the sink.",
    "{He} wins at chess and loses at cards, and prefers the cards.",
    "On long walks {he} talks to {himself} and sometimes laughs aloud.",
    "{surname} keeps the receipts of forty years in shoe boxes under the bed.",
    "{He} wears the same brown coat from the first frost to the last.",
    "At school {he} was thought lazy, which {he} now calls a misunderstanding.",
    "{His} handwriting is so small that colleagues use a magnifying glass.",
    "For a bet {he} once swam across the bay in the middle of October.",
    "{He} never travels without a thermos of tea and a torch.",
    "{surname} speaks three languages and is silent in all of them before noon.",
    "The postman stops for a chat, and {he} always has time for it.",
    "{He} keeps a list of words that {he} likes and reads it when {he} cannot sleep.",
    "A book about {his} profession lies half finished on the desk.",
    "In {his} pocket {he} carries a lucky coin with a hole in it.",
    "{He} votes in every election and complains about every result.",
    "{surname} has broken the same arm twice, both times on the same stairs.",
    "{He} can name every bird in the park by its call.",
    "At weddings {he} dances until the band packs up.",
    "{His} sister runs a small hotel by the sea, where {he} spends the summers.",
    "{He} taught {himself} to swim from a book, and it shows.",
    "The barber has cut {his} hair for thirty years and never asked how.",
    "{surname} throws nothing away that might be of use to somebody.",
    "{He} is known for arriving early and for leaving without saying goodbye.",
)


@dataclass(frozen=True)
class Person:
    """Who a portrait is about. ``workplace`` is named without its article."""

    first_name: str
    surname: str
    woman: bool
    town: str
    job: str
    workplace: str
    instrument: str
    pet: str
    dish: str
    teacher: str | None = None

    @property
    def name(self) -> str:
        return f"{self.first_name} {self.surname}"

    def portrait(self, rng: random.Random, asides: Iterator[str], num_words: int) -> str:
        """A passage that tells everything about this person, filled up with some of ``asides`` (templates)."""
        pronouns = ("she", "her", "her", "herself") if self.woman else ("he", "him", "his", "himself")
        values = {
            **{name: getattr(self, name) for name in ("name", "surname", "town", "job", "workplace", "instrument")},
            **{name: getattr(self, name) for name in ("pet", "dish", "teacher")},
            **dict(zip(("he", "him", "his", "himself"), pronouns, strict=True)),
            **{word: word_here.capitalize() for word, word_here in zip(("He", "Him", "His"), pronouns, strict=False)},
        }
        facts = [_WORKPLACES, _INSTRUMENTS, _PETS, _DISHES] + ([_TEACHERS] if self.teacher else [])
        return write_passage(
            rng,
            rng.choice(_LEADS).format(**values),
            [rng.choice(templates).format(**values) for templates in facts],
            (aside.format(**values) for aside in asides),
            num_words,
        )


def portraits(rng: random.Random, people: Sequence[Person], num_words: int) -> list[str]:
    """A portrait of each; they repeat a sentence only when all sentences have been used."""
    asides = endless(rng, _ASIDES)
    return [person.portrait(rng, asides, num_words) for person in people]


def make_people(rng: random.Random, workplaces: list[str]) -> list[Person]:
    """One person a workplace, who differ in everything as far as the lists reach."""
    count = len(workplaces)
    women, men = iter(rng.sample(words.WOMEN, len(words.WOMEN))), iter(rng.sample(words.MEN, len(words.MEN)))
    columns = (
        spread(rng, values, count)
        for values in (words.SURNAMES, words.TOWNS, words.JOBS, words.INSTRUMENTS, words.PETS, words.DISHES)
    )
    people = []
    for workplace, surname, town, job, instrument, pet, dish in zip(workplaces, *columns, strict=True):
        woman = rng.random() < 0.5
        first_name = next(women if woman else men)
        people.append(Person(first_name, surname, woman, town, job, workplace, instrument, pet, dish))
    return people
