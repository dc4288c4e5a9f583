"""tools/build_emoji.py on tiny packages in the layout of the real ones."""

import json
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tools.build_emoji import Concept, drawn_alike, main, read_image, test_concepts
from utils.data import load_dataset
from utils.data.emoji import PACKAGES, STYLES

GOOGLE, TWITTER, OPENMOJI, FLUENT = PACKAGES
CLASSES = {"animal": 16, "tool": 15, "rare": 14}


def picture(number: int, seed: int) -> Image.Image:
    """A shape of its own color on a transparent sheet."""
    color = np.random.default_rng((number, seed)).integers(0, 256, 3)
    pixels = np.zeros((72, 72, 4), np.uint8)
    pixels[16:56, 16:56] = [*color, 255]
    return Image.fromarray(pixels)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`node_modules` with the four packages; SVGs are drawn by a stand-in that reads a number from the file."""
    def svg_to_bytes(svg_path: str, width: int, height: int, skip_system_fonts: bool) -> bytes:
        file = BytesIO()
        picture(int(Path(svg_path).read_text()), width).save(file, "png")
        return file.getvalue()

    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    root, entries = tmp_path / "node_modules", []
    folders = {name: root / name for name in PACKAGES}
    for name, parts in ((GOOGLE, ["img/google/64"]), (TWITTER, ["img/twitter/64"]), (OPENMOJI, ["color/svg", "black/svg"]),
                        (FLUENT, ["assets"])):
        for part in parts:
            (folders[name] / part).mkdir(parents=True)
        (folders[name] / "package.json").write_text(json.dumps({"name": name, "license": "X"}))
        (folders[name] / "README.md").write_text("terms")
    (folders[OPENMOJI] / "LICENSE.txt").write_text("CC-BY-SA")
    kinds = [kind for kind, count in CLASSES.items() for _ in range(count)]
    for number, kind in enumerate([*kinds, "country"]):
        code = f"1f{number:03x}-fe0f"
        entries.append({"unified": code.upper(), "name": f"THING {number}", "image": f"{code}.png", "subcategory": kind,
                        "category": "Flags" if kind == "country" else "Objects", "sort_order": number})
        for seed, path in ((1, folders[GOOGLE] / "img/google/64"), (2, folders[TWITTER] / "img/twitter/64")):
            picture(number, seed).save(path / f"{code}.png")
        picture(number, 3).save(folders[FLUENT] / "assets" / f"1f{number:03x}.webp", lossless=True)
        for part in ("color", "black"):  # without the variation selector
            (folders[OPENMOJI] / part / "svg" / f"1F{number:03X}.svg").write_text(str(number + 100 * (part == "black")))
    (folders[GOOGLE] / "emoji.json").write_text(json.dumps(entries))
    return root


def build(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_file_has_every_common_concept_in_every_style(packages: Path, tmp_path: Path, capsys) -> None:
    assert build(packages, "--data-path", tmp_path / "data") == 0
    assert "155 images of 31 concepts in 2 classes and 5 styles; 9 concepts are for testing" in capsys.readouterr().out
    dataset = load_dataset("emoji", tmp_path / "data")
    assert dataset.classes == ["animal", "tool"]
    assert np.bincount(dataset.test.labels).tolist() == [5 * len(STYLES), 4 * len(STYLES)]
    sheets = {name: images[:, :, 32, 32] for name, images in (("train", dataset.train.images), ("test", dataset.test.images))}
    for split, number in (("train", 0), ("test", 1)):
        for seed, style in ((1, "noto"), (2, "twemoji"), (3, "fluent")):
            colors = {tuple(color) for color in sheets[split][dataset.domains[style][number]].tolist()}
            every = {tuple(np.asarray(picture(each, seed))[36, 36, :3].tolist()) for each in range(31)}
            assert colors <= every and len(colors) == len(dataset.domains[style][number])
    assert (dataset.train.images[:, :, 0, 0] == 255).all()  # white paper
    licenses = tmp_path / "data" / "emoji_licenses"
    assert {path.name for path in licenses.iterdir()} == {name.rpartition("/")[2] for name in PACKAGES}
    assert (licenses / "openmoji" / "LICENSE.txt").read_text() == "CC-BY-SA"


def test_packages_may_be_named_one_by_one_in_any_order(packages: Path, tmp_path: Path) -> None:
    folders = [packages / name for name in reversed(PACKAGES)]
    folders[0] = folders[0].rename(tmp_path / "elsewhere")
    (tmp_path / "unpacked").mkdir()
    folders[1] = folders[1].rename(tmp_path / "unpacked" / "package").parent  # as npm pack's archive unpacks
    assert build(*folders, "--data-path", tmp_path) == 0


def test_a_concept_that_one_style_lacks_is_left_out(packages: Path, tmp_path: Path, capsys) -> None:
    (packages / FLUENT / "assets" / "1f000.webp").unlink()
    assert build(packages, "--data-path", tmp_path) == 0
    assert "of 30 concepts" in capsys.readouterr().out


def concepts(*drawings: tuple[str, int]) -> list[Concept]:
    """Concepts of (class, gray level); the first style alone is drawn by it, the others all differ."""
    sheets = [np.full((4, 4, 3), 10 * number, np.uint8) for number in range(len(drawings))]
    return [Concept(kind, f"{number}", (np.full((4, 4, 3), level, np.uint8), *[sheets[number]] * 4))
            for number, (kind, level) in enumerate(drawings)]


def test_concepts_drawn_alike_are_in_one_part() -> None:
    many = concepts(*[("a", 20 * (number // 2)) for number in range(20)])
    group, test = drawn_alike(many), test_concepts(many)
    assert len(set(group)) == 10 and test.sum() == 6
    assert all(test[number] == test[number + 1] for number in range(0, 20, 2))


def test_drawings_that_two_classes_share_are_not_tested() -> None:
    shared = concepts(*[("a", 20 * number) for number in range(10)], *[("b", 20 * number) for number in range(5)],
                      *[("b", 5 + 20 * number) for number in range(5)])
    test = test_concepts(shared)
    assert test.any() and not test[:5].any() and not test[10:15].any()


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / FLUENT / "package.json").unlink(), f"`npm install {FLUENT}`"),
    (lambda root: (root / GOOGLE / "emoji.json").write_text("{"), "emoji.json' cannot be read"),
    (lambda root: (root / GOOGLE / "emoji.json").write_text('[{"name": 1}]'), "is not what this tool knows"),
    (lambda root: (root / GOOGLE / "emoji.json").write_text("[]"), "no subcategory has 15 emoji"),
    (lambda root: (root / TWITTER / "img/twitter/64/1f000-fe0f.png").write_text("damaged"), "cannot be decoded"),
])
def test_mistakes_are_one_sentence_and_status_2(packages: Path, tmp_path: Path, capsys, spoil, message: str) -> None:
    spoil(packages)
    assert build(packages, "--data-path", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_a_missing_rasteriser_is_named(packages: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert build(packages, "--data-path", tmp_path) == 2
    assert "`pip install resvg-py`" in capsys.readouterr().err


def test_a_drawing_is_rasterised_on_white(tmp_path: Path) -> None:
    resvg = pytest.importorskip("resvg_py")
    svg = tmp_path / "half.svg"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><path fill="#f00" d="M0 0h36v72H0z"/></svg>')
    pixels = read_image(svg, lambda path: bytes(resvg.svg_to_bytes(svg_path=str(path), width=64, height=64)))
    assert pixels.shape == (64, 64, 3) and pixels[5, 5].tolist() == [255, 0, 0] and pixels[5, 60].tolist() == [255] * 3
