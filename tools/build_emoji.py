"""Makes the file of the data set `emoji` from four npm packages: `python -m tools.build_emoji node_modules`.

Noto (emoji-datasource-google, Apache 2.0), Twemoji (emoji-datasource-twitter, CC-BY 4.0), OpenMoji in color and as line
drawings (openmoji, CC-BY-SA 4.0), and Fluent (@lobehub/fluent-emoji-3d, MIT) draw the same concepts. Categories are those of
`emoji.json` in the first. What the packages say about their licenses is copied beside the file.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.data.emoji import ALIKE, FILE, PACKAGES, SIZE, STYLES
from utils.errors import UserError, status_of
from utils.rng import uniforms
from utils.runs.files import write_bytes

LEFT_OUT = frozenset({"Flags", "Symbols", "Component"})  # no pictures of things
FEWEST = 15  # concepts that a class needs in all styles
TEST_FRACTION = 0.3
LICENSES = "emoji_licenses"
_SEED = 0


@dataclass(frozen=True)
class Concept:
    """One emoji: its subcategory, its name, and its image in every style, uint8 `[64, 64, 3]` each."""

    subcategory: str
    name: str
    images: tuple[np.ndarray, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the file; the exit status is 2 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m tools.build_emoji", description="Make the file of the data set emoji.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help=f"unpacked npm packages, or a folder in which they lie: {', '.join(PACKAGES)}")
    parser.add_argument("--data-path", type=Path, default=Path("data"), help="where the file goes (default: data)")
    options = parser.parse_args(arguments)

    def work() -> None:
        packages = find_packages(options.folders)
        concepts = read_concepts(packages)
        test = test_concepts(concepts)
        path = write(concepts, test, packages, Path(os.path.expanduser(options.data_path)))
        classes = Counter(concept.subcategory for concept in concepts)
        print(f"{path}: {len(concepts) * len(STYLES)} images of {len(concepts)} concepts in {len(classes)} classes and "
              f"{len(STYLES)} styles; {int(test.sum())} concepts are for testing; a class has {min(classes.values())} to "
              f"{max(classes.values())} concepts")

    return status_of(work)


def find_packages(folders: Sequence[Path]) -> dict[str, Path]:
    """The folder of each of `PACKAGES`: one of `folders`, or below one, as npm leaves them; raises UserError."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"FOLDER: '{folder}' is no folder; give unpacked npm packages or a folder in which they lie.")
    places = [place for folder in folders for place in (folder, folder / "package", *(folder / name for name in PACKAGES))]
    there = [place for place in reversed(places) if (place / "package.json").is_file()]
    named = {_read_json(place / "package.json").get("name"): place for place in there}
    for package in PACKAGES:
        if package not in named:
            given = ", ".join(f"'{folder}'" for folder in folders)
            raise UserError(f"FOLDER: the package '{package}' is in none of {given}; "
                            f"`npm install {package}` puts it into ./node_modules.")
    return {package: named[package] for package in PACKAGES}


def read_concepts(packages: dict[str, Path]) -> list[Concept]:
    """Every concept that all styles draw, of the subcategories that have enough of them, in Unicode's order."""
    google, twitter, openmoji, fluent = (packages[package] for package in PACKAGES)
    try:
        entries = sorted((entry for entry in _read_json(google / "emoji.json") if entry["category"] not in LEFT_OUT),
                         key=lambda entry: entry["sort_order"])
        raster = [(google / "img/google/64", "image"), (twitter / "img/twitter/64", "image")]
        drawn = [{entry["unified"]: folder / entry[key] for entry in entries if (folder / entry[key]).is_file()}
                 for folder, key in raster]
        drawn += [_by_code(folder) for folder in (openmoji / "color/svg", openmoji / "black/svg", fluent / "assets")]
        found = []
        for entry in entries:
            paths = [style.get(entry["unified"]) or style.get(_code(entry["unified"])) for style in drawn]
            if all(paths):
                found.append((entry["subcategory"], entry["name"], paths))
    except (KeyError, TypeError) as error:
        raise UserError(f"FOLDER: '{google / 'emoji.json'}' is not what this tool knows ({error!r}); install version 16 of "
                        f"'{PACKAGES[0]}'.") from error
    sizes = Counter(subcategory for subcategory, _, _ in found)
    wanted = [each for each in found if sizes[each[0]] >= FEWEST]
    if not wanted:
        raise UserError(f"FOLDER: no subcategory has {FEWEST} emoji in all styles; install the packages again.")
    draw_svg = _rasteriser()
    return [Concept(subcategory, name, tuple(read_image(path, draw_svg) for path in paths))
            for subcategory, name, paths in wanted]


def read_image(path: Path, draw_svg: Callable[[Path], bytes]) -> np.ndarray:
    """An image file as uint8 `[64, 64, 3]` on white; `draw_svg` gives the PNG of an SVG."""
    try:
        with Image.open(BytesIO(draw_svg(path)) if path.suffix == ".svg" else path) as file:
            picture = file.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UserError(f"FOLDER: '{path}' cannot be decoded ({' '.join(str(error).split())}); install its package "
                        f"again.") from error
    paper = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(paper, picture).convert("RGB"))


def drawn_alike(concepts: Sequence[Concept]) -> np.ndarray:
    """For each concept the number of its group, int64 `[n]`: concepts that any style draws alike are in one."""
    group = np.arange(len(concepts))
    for style in range(len(STYLES)):
        pixels = np.stack([concept.images[style] for concept in concepts]).reshape(len(concepts), -1).astype(np.int16)
        for number in range(len(concepts)):
            near = np.abs(pixels[number + 1 :] - pixels[number]).mean(1) <= ALIKE
            for other in number + 1 + np.flatnonzero(near):
                group[group == group[other]] = group[number]
    return group


def test_concepts(concepts: Sequence[Concept]) -> np.ndarray:
    """Which concepts are for testing, bool `[n]`: about `TEST_FRACTION` of every class, drawn alike ones together.

    Concepts that a drawing shares with another class stay in training: in a test they would be told wrong by design.
    """
    group, classes = drawn_alike(concepts), np.array([concept.subcategory for concept in concepts])
    mixed = {number for number in group if len(set(classes[group == number])) > 1}
    draw = uniforms(_SEED, "emoji", "split", index=np.arange(len(concepts)), count=1)[:, 0]
    test = np.zeros(len(concepts), dtype=bool)
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        wanted = round(TEST_FRACTION * len(members))
        for number in dict.fromkeys(group[members[np.argsort(draw[members])]]):
            own = group == number
            if number not in mixed and test[members].sum() + own.sum() <= wanted:
                test |= own
        if not test[members].any():
            raise UserError(f"FOLDER: no concept of '{name}' can be held out, all are drawn like others; report the packages' "
                            f"versions.")
    return test


test_concepts.__test__ = False


def write(concepts: Sequence[Concept], test: np.ndarray, packages: dict[str, Path], data_path: Path) -> Path:
    """The file, and the packages' words on their licenses beside it; raises UserError where `data_path` cannot be written."""
    classes = sorted({concept.subcategory for concept in concepts})
    content = BytesIO()
    np.savez_compressed(
        content, images=np.stack([image for concept in concepts for image in concept.images]),
        labels=np.repeat([classes.index(concept.subcategory) for concept in concepts], len(STYLES)).astype(np.int64),
        styles=np.tile(np.arange(len(STYLES), dtype=np.int64), len(concepts)), test=np.repeat(test, len(STYLES)),
        classes=np.array(classes), concepts=np.array([concept.name for concept in concepts]))
    path = data_path / FILE
    try:
        for package, folder in packages.items():
            place = data_path / LICENSES / package.rpartition("/")[2]
            place.mkdir(parents=True, exist_ok=True)
            for name in (*sorted(folder.glob("LICENSE*")), folder / "README.md", folder / "package.json"):
                if name.is_file():
                    shutil.copyfile(name, place / name.name)
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"--data-path: '{data_path}' cannot be written ({error.strerror}); choose another folder.") from error
    return path


def _rasteriser() -> Callable[[Path], bytes]:
    """Draws an SVG file as PNG of `SIZE` pixels a side."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("OpenMoji's drawings are SVG and need a rasteriser: `pip install resvg-py`.") from error
    return lambda path: bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=SIZE, height=SIZE, skip_system_fonts=True))


def _by_code(folder: Path) -> dict[str, Path]:
    """The files of `folder` by the code points of their names."""
    return {_code(path.stem): path for path in sorted(folder.glob("*"))}


def _code(name: str) -> str:
    """Code points in capitals, without the variation selector that some packages leave out."""
    return "-".join(point for point in name.upper().split("-") if point != "FE0F")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"FOLDER: '{path}' cannot be read ({' '.join(str(error).split())}); install its package "
                        f"again.") from error


if __name__ == "__main__":
    sys.exit(main())
