"""Chronicles: passages about a place."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lmcache.evaluation.tasks import words
from lmcache.evaluation.tasks.draw import endless, spread
from lmcache.evaluation.tasks.passage import write_passage

_LEADS: Final = (
    "The {name} stands in {town}.",
    "Visitors to {town} seldom miss the {name}.",
    "In the centre of {town} lies the {name}.",
)
_OPENINGS: Final = (
    "It opened its doors in {year}.",
    "It was opened in {year} after a long dispute about money.",
    "The first visitors were let in during the spring of {year}.",
)
_RELATIVE_OPENINGS: Final = (
    "It opened {distance} {before_or_after} the {other}.",
    "It was opened {distance} {before_or_after} the {other}, with far fewer guests.",
)
_FOUNDERS: Final = (
    "It was founded by {founder}, who paid for everything.",
    "Its founder was {founder}, a merchant without heirs.",
    "The idea came from {founder}, who founded it against all advice.",
)
_TREASURES: Final = (
    "Its pride is {treasure}.",
    "Most people come for {treasure}.",
    "In the entrance hall one sees {treasure}.",
)
_MATERIALS: Final = (
    "The walls are of {material}.",
    "It is built of {material}.",
    "The architect chose {material} for the whole building.",
)
_ASIDES: Final = (
    "The roof leaked for decades until a collection among the citizens paid for its repair.",
    "On Mondays it is closed, and the staff polish the floors.",
    "A café on the ground floor sells coffee that is better than its reputation.",
    "The old heating makes noises that new employees take for footsteps.",
    "During a flood the cellar stood under water, and boats were rowed through the gate.",
    "School classes come in the morning, tourists in the afternoon, and pigeons all day.",
    "The long corridor on the upper floor is said to be the coldest in the country.",
    "Every autumn the courtyard is used for a market of second-hand books.",
    "Plans to add another wing were drawn several times and put away again.",
    "A plaque beside the entrance is so worn that nobody can read it any more.",
    "The caretaker lives under the roof and winds the clocks once a week.",
    "In winter the windows are covered with heavy curtains to keep the warmth inside.",
    "A famous film was shot here, but the scene was cut in the end.",
    "Its bell is rung only on the last evening of the year.",
    "The lift is so small that pianos have to be carried up the stairs.",
    "From the terrace one sees the river and, on clear days, the hills beyond it.",
    "Two trees in front of it were planted by a queen and are protected by law.",
    "A parrot that belonged to a former director could imitate the telephone.",
    "The keys hang on a board beside the door, and one of them fits no lock.",
    "Fire broke out twice, and both times it was put out before the firemen came.",
    "The neighbours complained about the noise for years and then began to miss it.",
    "A painter lived in the attic and paid his rent with portraits of the staff.",
    "Swallows nest under the eaves and are entered in the visitors' book each spring.",
    "The stairs creak so loudly that guests take off their shoes.",
    "Electric light came late, and some rooms are still without it.",
    "A tunnel is said to lead from the cellar to the harbour, but nobody has found it.",
    "The clock above the gate runs four minutes slow, and everyone has got used to it.",
    "On its hundredth birthday the band played so badly that people still talk about it.",
    "Snow once blocked the entrance for a week, and the staff climbed in by a window.",
    "The guest book has been signed by three presidents and one tightrope walker.",
    "Its garden is small, but the roses win prizes year after year.",
    "In the war the windows were painted black, and one was never cleaned.",
    "A ghost is mentioned in the brochure, though only in small letters.",
    "The floor of the great hall was laid by a carpenter who could not count.",
    "Students work here in the summer and are paid mostly in sandwiches.",
    "A tram used to stop in front of it, and the rails can still be seen.",
    "The director's desk was a gift and does not fit through any of the doors.",
    "Tickets are sold by a machine that gives too much change.",
    "Somebody leaves a white flower at the gate every first of March.",
    "The letters above the door were gilded again last year.",
    "Its cellar is so dry that the city keeps its oldest documents there.",
    "The archive holds more papers than anyone has been able to count.",
)


@dataclass(frozen=True)
class Place:
    """What a chronicle is about. ``name`` has no article."""

    name: str
    town: str
    year: int
    founder: str
    treasure: str
    material: str

    def chronicle(
        self, rng: random.Random, asides: Iterator[str], num_words: int, *, dated_by: Place | None = None
    ) -> str:
        """A passage that tells everything about this place, filled up with some of ``asides``.

        With ``dated_by`` its year is told as years before or after the opening of that place.
        """
        if dated_by is None:
            opening = rng.choice(_OPENINGS).format(year=self.year)
        else:
            years = abs(self.year - dated_by.year)
            opening = rng.choice(_RELATIVE_OPENINGS).format(
                distance="one year" if years == 1 else f"{years} years",
                before_or_after="before" if self.year < dated_by.year else "after",
                other=dated_by.name,
            )
        return write_passage(
            rng,
            rng.choice(_LEADS).format(name=self.name, town=self.town),
            [
                opening,
                rng.choice(_FOUNDERS).format(founder=self.founder),
                rng.choice(_TREASURES).format(treasure=self.treasure),
                rng.choice(_MATERIALS).format(material=self.material),
            ],
            asides,
            num_words,
        )


def chronicles(
    rng: random.Random, places: Sequence[Place], num_words: int, *, dated_by: Mapping[Place, Place] | None = None
) -> list[str]:
    """A chronicle of each; they repeat a sentence only when all sentences have been used."""
    asides = endless(rng, _ASIDES)
    dates = dated_by or {}
    return [place.chronicle(rng, asides, num_words, dated_by=dates.get(place)) for place in places]


def make_places(rng: random.Random, count: int) -> list[Place]:
    """``count`` places with names and years of their own."""
    columns = (
        spread(rng, values, count)
        for values in (words.PLACE_NAMES, words.PLACES, words.TOWNS, words.TREASURES, words.MATERIALS)
    )
    founders = zip(spread(rng, words.WOMEN + words.MEN, count), spread(rng, words.SURNAMES, count), strict=True)
    years = rng.sample(range(1780, 1990), count)
    return [
        Place(f"{first} {last}", town, year, " ".join(founder), treasure, material)
        for first, last, town, treasure, material, founder, year in zip(*columns, founders, years, strict=True)
    ]
