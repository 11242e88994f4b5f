"""Names and things that generated passages are made of. A changed list changes the tasks of every seed."""

from __future__ import annotations

from typing import Final

WOMEN: Final = (
    "Alice", "Beatrice", "Clara", "Diana", "Eleanor", "Florence", "Grace", "Hannah", "Irene", "Julia", "Katherine",
    "Laura", "Margaret", "Nora", "Olivia", "Pauline", "Rachel", "Sophie", "Teresa", "Victoria", "Wendy", "Yvonne",
)  # fmt: skip
MEN: Final = (
    "Arthur", "Benjamin", "Charles", "Daniel", "Edward", "Frederick", "George", "Henry", "Isaac", "James", "Kenneth",
    "Leonard", "Martin", "Nicholas", "Oscar", "Patrick", "Robert", "Samuel", "Thomas", "Victor", "Walter", "Simon",
)  # fmt: skip
SURNAMES: Final = (
    "Abbott", "Barker", "Carver", "Dalton", "Ellison", "Fletcher", "Garner", "Hadley", "Ingram", "Jennings", "Keller",
    "Lambert", "Marsh", "Norwood", "Osborne", "Palmer", "Quincy", "Ramsey", "Sutton", "Thornton", "Underwood",
    "Vaughan", "Whitaker", "Yates", "Alvarez", "Bergman", "Castillo", "Duarte", "Eriksen", "Fontaine", "Haddad",
    "Ivanova", "Kaplan", "Lindqvist", "Moretti", "Nakamura", "Okafor", "Petrov", "Rossi", "Sandoval",
)  # fmt: skip
TOWNS: Final = (
    "Ashford", "Bristol", "Cardiff", "Durham", "Exeter", "Falmouth", "Galway", "Hamburg", "Inverness", "Jersey",
    "Kingston", "Lisbon", "Manchester", "Norwich", "Oxford", "Plymouth", "Quebec", "Richmond", "Salem", "Toronto",
    "Utrecht", "Vienna", "Windsor", "York", "Zurich", "Bergen", "Geneva", "Krakow", "Lyon", "Porto",
)  # fmt: skip
JOBS: Final = (
    "architect", "baker", "botanist", "carpenter", "chemist", "dentist", "engineer", "gardener", "geologist",
    "historian", "illustrator", "journalist", "lawyer", "librarian", "mechanic", "nurse", "pharmacist", "photographer",
    "potter", "surgeon", "tailor", "translator", "veterinarian", "watchmaker",
)  # fmt: skip
INSTRUMENTS: Final = (
    "accordion", "banjo", "cello", "clarinet", "flute", "guitar", "harp", "mandolin", "oboe", "piano", "saxophone",
    "trombone", "trumpet", "violin",
)  # fmt: skip
PETS: Final = (
    "a grey cat", "a parrot", "two rabbits", "a tortoise", "an old greyhound", "a hedgehog", "three canaries",
    "a pony", "a black terrier", "a goat", "a white owl", "a pair of ferrets",
)  # fmt: skip
DISHES: Final = (
    "mushroom soup", "lemon cake", "lamb stew", "apple pie", "fish curry", "onion tart", "potato dumplings",
    "cheese omelette", "bean salad", "plum jam", "chicken pie", "ginger biscuits",
)  # fmt: skip
PLACE_NAMES: Final = (
    "Anchor", "Bell", "Cedar", "Dove", "Falcon", "Garland", "Harbour", "Ivory", "Juniper", "Lantern", "Maple",
    "Meridian", "Orchard", "Pilgrim", "Raven", "Riverside", "Silver", "Summit", "Tower", "Willow",
)  # fmt: skip
PLACES: Final = (
    "Museum", "Library", "Theatre", "Hospital", "Observatory", "Academy", "Brewery", "Gallery", "Workshop",
    "Laboratory", "Press", "School",
)  # fmt: skip
TREASURES: Final = (
    "a bronze telescope", "a painted piano", "a whale skeleton", "a glass staircase", "a collection of old maps",
    "a silver teapot", "a marble fountain", "a steam engine", "a wall of blue tiles", "a carved oak door",
    "a clock without hands", "a tapestry of a fox hunt",
)  # fmt: skip
MATERIALS: Final = (
    "red brick", "white limestone", "dark slate", "yellow sandstone", "grey granite", "painted timber",
    "polished concrete", "green copper",
)  # fmt: skip
