"""Makes the data file from the emoji packages on npm.

`npm pack` fetches the packages (36 MB) into a folder; everything else happens here. The 801 subjects are those of
names.json (called as emojibase-data calls them, in small letters) and no others: subjects that are in no picture stay
unseen, for judging later.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from lib_dynfuse.demo import split

PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "gradient": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "hc": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
# Other hands' drawings of the same subjects, for the judge alone: no picture of theirs is in the data file.
OTHER_HANDS = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
INK = "#111"  # of the drawings that leave their colour to whoever shows them

# Some packages ship an empty list of characters; their icons are named as their sister's.
NAMED_AS = {"gradient": "hc", "flat": "hc", "hc": "hc", "noto": "noto", "blob": "noto"}


def archive(package: str) -> str:
    """The file that `npm pack` makes of a package: `@a/b@1.2` gives `a-b-1.2.tgz`."""
    name, version = package.lstrip("@").rsplit("@", 1)
    return f"{name.replace('/', '-')}-{version}.tgz"


def fetch(folder: Path, packages: Iterable[str] = tuple(PACKAGES.values())) -> None:
    """Downloads whatever package `folder` lacks.

    Raises:
        RuntimeError: npm is not there, or could not fetch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (folder / archive(package)).exists()]
    if not missing:
        return
    try:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"npm could not fetch {', '.join(missing)}: {error}") from error


class Package:
    """One npm archive, read into memory."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as tar:
            read = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
            self.files = {name.removeprefix("package/"): file.read() for name, file in read if file}

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])


class Icons:
    """The drawings of an Iconify package, by name."""

    def __init__(self, package: Package) -> None:
        self.all = package.json("icons.json")

    def draw(self, name: str, pixels: int) -> Image.Image | None:
        """The icon under its own name or another's, None where there is none."""
        name = self.all.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.all["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, self.all[side]) for side in ("width", "height"))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" color="{INK}">'
        svg = f"{head}{icon['body']}</svg>"
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels))))


def photograph(package: Package, code: str) -> Image.Image | None:
    """The 3D picture of a character; some are filed with the selector that asks for a coloured glyph."""
    raw = package.files.get(f"assets/{code}.webp") or package.files.get(f"assets/{code}-fe0f.webp")
    return Image.open(io.BytesIO(raw)) if raw else None


def on_white(image: Image.Image, pixels: int) -> np.ndarray:
    """uint8 [pixels, pixels, 3]."""
    image = image.convert("RGBA").resize((pixels, pixels), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB"))


def build(packages: Path, file: Path, pixels: int = 128, bar: bool = True) -> None:
    """Renders every subject in every style that has it and writes x, subj, sty, names, styles, group, code.

    Args:
        packages: folder that `fetch` has filled.
        file: the npz to write.
    """
    opened = {style: Package(packages / archive(package)) for style, package in PACKAGES.items()}
    icons = {style: Icons(opened[style]) for style in NAMED_AS}
    characters = {style: opened[style].json("chars.json") for style in set(NAMED_AS.values())}
    x, subject, style_index = [], [], []
    for index, (_, code, _) in enumerate(tqdm(split.catalogue(), desc="render", disable=not bar)):
        for number, style in enumerate(split.STYLES):
            if style == "3d":
                image = photograph(opened[style], code)
            else:
                icon = characters[NAMED_AS[style]].get(code)
                image = icons[style].draw(icon, pixels) if icon else None
            if image is not None:
                x.append(on_white(image, pixels))
                subject.append(index)
                style_index.append(number)
    names, codes, groups = zip(*split.catalogue(), strict=True)
    np.savez_compressed(
        file,
        x=np.stack(x),
        subj=np.array(subject),
        sty=np.array(style_index),
        names=np.array(names),
        styles=np.array(split.STYLES),
        group=np.array(groups),
        code=np.array(codes),
    )


def build_other_hands(packages: Path, file: Path, pixels: int = 64, bar: bool = True) -> None:
    """Renders the same subjects as other sets draw them and writes x and subj, shaped as `build` does.

    Their icons have no list of characters or an empty one: they go by the names that the other sets give a character.

    Args:
        packages: folder with the packages of `OTHER_HANDS`, and with those of `PACKAGES` for the names.
        file: the npz to write.
    """
    icons = {hand: Icons(Package(packages / archive(package))) for hand, package in OTHER_HANDS.items()}
    named = [Package(packages / archive(package)).json("chars.json") for package in _naming()]
    x, subject = [], []
    for index, (name, code, _) in enumerate(tqdm(split.catalogue(), desc="render", disable=not bar)):
        names = [*(characters[code] for characters in named if code in characters), name.replace(" ", "-")]
        names += [one.replace("-", "") for one in names]
        for hand in OTHER_HANDS:
            drawings = (icons[hand].draw(one, pixels) for one in names)
            image = next((drawing for drawing in drawings if drawing is not None), None)
            if image is not None:
                x.append(on_white(image, pixels))
                subject.append(index)
    np.savez_compressed(file, x=np.stack(x), subj=np.array(subject))


def _naming() -> tuple[str, ...]:
    return OTHER_HANDS["twemoji"], PACKAGES["noto"], PACKAGES["hc"]
