"""The data set `glyphs`: one hundred printed characters, drawn from the fonts that matplotlib carries.

Nothing is downloaded and no font of the machine is used: one version of matplotlib draws the same images everywhere
(between versions single pixels may differ by a gray level). Training images come from twelve faces, test images from
four others. Each family and each style of a test face also occurs in training, the combination never: a classifier has
to carry over what it learned about a character.

Shapes: n images, 3 channels, 32 x 32 pixels, light ink on dark paper, the three channels equal.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font, LoadFlags
from torch.nn import functional

from utils.errors import UserError, unknown
from utils.rng import uniforms

TRAIN_FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta",
)
TEST_FACES = ("DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBol")
FACES = TRAIN_FACES + TEST_FACES

# One hundred characters that stay apart in every face, italics included: of upper and lower case twins (C c, O o)
# and of letters that scripts share (Latin, Greek and Cyrillic A) only one is here. Digits are another data set.
CHARACTERS = (
    "ABCDEFGHIJKLMNPQRSTUVWXYZ"
    "abdefghmnqrt"
    "ΓΔΘΛΞΠΣΦΨΩ"
    "βγδζλξσωμ"
    "БДЖИЦЧШЭЮЯЂЉЊЫ"
    "?&@#$%*+=<{}§¶©±£€¥«†"
    "ÆŒßþØŁŋɘ¿"
)

SIZE = 32
TRAIN_PER_FACE = 4
TEST_PER_FACE = 5
SEED = 0

_CANVAS = 96  # pixels of the drawing before jitter; the em of a face takes 64 of them
_EM = 64
_BASELINE = 70  # row of the canvas on which characters stand
_OVERSAMPLING = 2
_CHUNK = 512


def load_glyphs(seed: int = SEED) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, np.ndarray, list[str]]:
    """Train images, train labels, test images, test labels and class names.

    Images are uint8 `[n, 3, 32, 32]` and labels int64 `[n]`. `seed` draws position, size, angle and the
    rest of the jitter; the data set as everyone uses it is that of the default.
    """
    train_images, train_labels = render(CHARACTERS, TRAIN_FACES, TRAIN_PER_FACE, seed)
    test_images, test_labels = render(CHARACTERS, TEST_FACES, TEST_PER_FACE, seed)
    return train_images, train_labels, test_images, test_labels, list(CHARACTERS)


def render(
    characters: Sequence[str], faces: Sequence[str], per_face: int, seed: int, strength: float = 1.0
) -> tuple[torch.Tensor, np.ndarray]:
    """`per_face` jittered images of every character in every face that has it.

    Returns images uint8 `[n, 3, 32, 32]` and labels int64 `[n]`, positions in `characters`, sorted by label and then
    by face. An image depends on the character, the face, its number among the `per_face` (below 1000) and the seed
    alone, not on what else is drawn. `strength` scales all of the jitter; 0 is clean print.
    """
    drawings, labels, keys = [], [], []
    for label, character in enumerate(characters):
        for face in faces:
            if has(face, character):
                drawings.append(drawing(character, face))
                labels.append(label)
                keys.append(ord(character) * len(FACES) + FACES.index(face))
    index = np.repeat(np.array(keys, dtype=np.int64), per_face) * 1000 + np.tile(np.arange(per_face), len(keys))
    jitter = uniforms(seed, "glyphs", "jitter", index=index, count=9)
    source = torch.from_numpy(np.stack(drawings))
    out = torch.empty(len(index), 3, SIZE, SIZE, dtype=torch.uint8)
    for start in range(0, len(index), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(index)))
        grain = uniforms(seed, "glyphs", "grain", index=index[rows], count=SIZE * SIZE)
        picks = torch.arange(rows.start, rows.stop) // per_face
        out[rows] = _photograph(source[picks], torch.from_numpy(jitter[rows]), torch.from_numpy(grain), strength)
    return out, np.repeat(np.array(labels, dtype=np.int64), per_face)


def has(face: str, character: str) -> bool:
    """Whether `face` draws `character` itself (and not a box in its place)."""
    return ord(character) in _characters(face)


def drawing(character: str, face: str) -> np.ndarray:
    """The bare character as ink coverage, uint8 `[96, 96]`: centred sideways, standing on the baseline.

    Size and height above the line are the face's own, so that a comma is no apostrophe. Unhinted outlines are
    scaled exactly; hinting would depend on the version of FreeType.
    """
    font = _font(face)
    bearing = font.load_char(ord(character), flags=LoadFlags.NO_HINTING).horiBearingY
    font.set_text(character, 0.0, flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return _stand(np.asarray(font.get_image()), -(-bearing // 64))  # FreeType counts in 64ths of a pixel


def _stand(ink: np.ndarray, above: int) -> np.ndarray:
    """An empty canvas with the ink on it, centred sideways, its upper edge so many rows above the baseline.

    Versions of matplotlib leave different margins around the ink, hence the cut; what does not fit is cut off too.
    """
    canvas = np.zeros((_CANVAS, _CANVAS), dtype=np.uint8)
    ys, xs = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(ys):
        return canvas
    ink = ink[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    height, width = ink.shape
    top, left = _BASELINE - above, (_CANVAS - width) // 2
    rows = slice(max(top, 0), min(top + height, _CANVAS))
    columns = slice(max(left, 0), min(left + width, _CANVAS))
    inside = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    canvas[rows, columns] = inside
    return canvas


def _photograph(drawings: torch.Tensor, jitter: torch.Tensor, grain: torch.Tensor, strength: float) -> torch.Tensor:
    """Drawings uint8 `[n, 96, 96]` and uniform numbers `jitter [n, 9]`, `grain [n, 1024]` -> images.

    Computed in float64, so that machines which round differently still agree on the 8-bit result.
    """
    spread = strength * (2.0 * jitter - 1.0)
    dim = strength * jitter
    fine = SIZE * _OVERSAMPLING
    grid = functional.affine_grid(_camera(spread), [len(drawings), 1, fine, fine], align_corners=False)
    ink = functional.grid_sample(drawings[:, None].double() / 255, grid, align_corners=False)
    ink = functional.avg_pool2d(ink, 3, stride=1, padding=1)
    weight = (1.0 + 0.6 * spread[:, 5])[:, None, None, None]  # below 1: thin strokes, above 1: fat ones
    ink = functional.avg_pool2d((ink * (1.0 + weight)).clamp(max=1.0), _OVERSAMPLING)
    paper = (0.25 * dim[:, 6])[:, None, None, None]
    level = (1.0 - 0.35 * dim[:, 7])[:, None, None, None]
    noise = (0.16 * dim[:, 8])[:, None, None, None] * (2.0 * grain.view(-1, 1, SIZE, SIZE) - 1.0)
    gray = (paper + (level - paper) * ink + noise).clamp(0.0, 1.0)
    return (gray * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _camera(spread: torch.Tensor) -> torch.Tensor:
    """Affine maps `[n, 2, 3]` from image to drawing: angle, size, proportion and position, from numbers in -1..1."""
    angle = np.deg2rad(12.0) * spread[:, 0]
    zoom = 1.0 + 0.18 * spread[:, 1]
    width = 1.0 + 0.12 * spread[:, 2]
    cosine, sine = torch.cos(angle), torch.sin(angle)
    shift = 0.14 * spread[:, 3:5]  # in halves of the image
    rows = [zoom * width * cosine, -zoom * sine, shift[:, 0], zoom * width * sine, zoom * cosine, shift[:, 1]]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


@cache
def _font(face: str) -> FT2Font:
    if face not in FACES:
        raise unknown("face", face, FACES)
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise UserError(f"matplotlib's font {face}.ttf is not at {path}; reinstall matplotlib.")
    font = FT2Font(str(path))
    font.set_size(_EM, 72)  # at 72 dots per inch a point is a pixel
    return font


@cache
def _characters(face: str) -> frozenset[int]:
    return frozenset(_font(face).get_charmap())
