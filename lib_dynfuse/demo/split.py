"""Which subjects and styles the base model learns, and which are kept for the LoRAs and for judging.

Text encoder, UNet and our autoencoder never see a *truth picture*: a held-out subject in a held-out style.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

STYLES = ("3d", "gradient", "flat", "noto", "blob", "hc")
BASE_STYLES = ("3d", "flat", "noto")
SUBJECT_STYLES = ("3d", "gradient", "flat", "noto")  # what a subject LoRA is taught from
HELD_STYLES = ("blob", "hc")

# 3d, gradient and flat are the same drawing with another shading, so a judge counts them as one.
JUDGED_STYLES = ("fluent", "noto", "blob", "hc")
JUDGED_AS = {"3d": "fluent", "gradient": "fluent", "flat": "fluent", "noto": "noto", "blob": "blob", "hc": "hc"}

STYLE_WORDS = {
    "3d": "3d",
    "gradient": "gradient",
    "flat": "flat",
    "noto": "noto",
    "blob": "blob",
    "hc": "high contrast",
}


def listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


HELD_SUBJECTS = listed("""
    fox, strawberry, rocket, guitar, penguin, mushroom, cactus, octopus, hamburger, snail, sailboat, umbrella, crown,
    anchor, camera, butterfly, cherries, carrot, snowman, trophy, watermelon, hot beverage, elephant, old key
""")

# Fresh once: a rule that was tuned without them was reported on them, and later ones were tuned on them too.
REPORTED_SUBJECTS = listed("""
    camel, turtle, scorpion, rhinoceros, crocodile, tomato, ice cream, cookie, taco, cocktail glass, factory,
    automobile, motor scooter, sun, tornado, crystal ball, video game, violin, trumpet, lipstick, bomb, closed book,
    moai, sunglasses
""")

# Kept back until every rule was tuned on the others: what is found there was not looked for.
FRESH_SUBJECTS = listed("""
    gorilla, rooster, dove, blowfish, squid, spiral shell, kiwi fruit, baguette bread, shortcake, candy, fountain,
    roller coaster, ambulance, satellite, watch, carp streamer, bowling, boxing glove, microphone, flashlight, red
    paper lantern, money bag, bow and arrow, shopping cart
""")

# Beside the held-out ones, whose LoRAs are in the box.
MORE_SUBJECTS = (*REPORTED_SUBJECTS, *FRESH_SUBJECTS)

BASE_SUBJECTS = listed("""
    monkey face, dog face, cat face, lion, unicorn, cow face, pig face, rabbit, koala, panda, bat, hatching chick,
    eagle, duck, owl, frog, snake, spouting whale, shark, crab, honeybee, lady beetle, spider, rose, sunflower, tulip,
    evergreen tree, four leaf clover, maple leaf, cherry blossom, grapes, lemon, red apple, eggplant, ear of corn, hot
    pepper, bread, croissant, cheese wedge, french fries, pizza, hot dog, popcorn, doughnut, lollipop, wine glass,
    beer mug, house, castle, volcano, tent, ferris wheel, locomotive, fire engine, taxi, airplane, helicopter,
    bicycle, hourglass done, alarm clock, crescent moon, star, cloud, rainbow, high voltage, snowflake, fire, droplet,
    jack-o-lantern, christmas tree, balloon, wrapped gift, soccer ball, basketball, american football, game die,
    artist palette, necktie, t-shirt, jeans, backpack, high-heeled shoe, top hat, graduation cap, loudspeaker, musical
    note, headphone, drum, telephone, laptop, television, candle, package, pencil, scissors, locked, hammer, shield,
    gear, microscope
""")


@cache
def catalogue() -> tuple[tuple[str, str, int], ...]:
    """The 801 subjects of the data as (name, Unicode code points, emoji group), in the order of the data file."""
    rows = json.loads(Path(__file__).with_name("names.json").read_text())
    return tuple((name, code, group) for name, code, group in rows)


def caption(name: str, style: str) -> str:
    """What a person types to get this subject in this style, for example `fox emoji, high contrast style`."""
    return f"{name} emoji, {STYLE_WORDS[style]} style"


def truth_mask(names: list[str], styles: list[str], subject: np.ndarray, style: np.ndarray) -> np.ndarray:
    """Boolean mask over pictures, True for a truth picture.

    Args:
        names, styles: what the indices mean.
        subject, style: [N] integer indices into them.
    """
    held_subjects = [names.index(name) for name in HELD_SUBJECTS if name in names]
    held_styles = [styles.index(name) for name in HELD_STYLES if name in styles]
    return np.isin(subject, held_subjects) & np.isin(style, held_styles)
