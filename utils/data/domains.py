"""Image domains: the same classes seen through another lens, for streams whose right growth decision is known.

`DOMAINS` maps a name to a function of images and random numbers. Domains compose: `"rotated+grating"` rotates and then lays a
grating over it, and the whole string is the domain. The random numbers of an image are keyed by (seed, split, image), so what
it looks like depends on nothing else.

Shapes: n images float32 `[n, 3, h, w]` in 0..1, `u` uniform numbers float32 `[n, k]`.
"""

import math
from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from utils.errors import UserError, unknown
from utils.rng import uniforms

DRAWS = 64  # uniform numbers that every domain may use for an image

_DOTS = 10  # disks that `dots` paints, three numbers each


def plain(images: Tensor, u: Tensor) -> Tensor:
    """As they are."""
    return images


def grating(images: Tensor, u: Tensor) -> Tensor:
    """Behind the ink, a sine grating of random angle and phase, four to six periods to the image."""
    y, x = _grid(images)
    angle, periods = math.pi * u[:, :1, None], 4 + 2 * u[:, 1:2, None]
    wave = torch.sin(2 * math.pi * (periods * (x * angle.cos() + y * angle.sin()) + u[:, 2:3, None]))
    return torch.maximum(images, 0.25 + 0.25 * wave[:, None])


def dots(images: Tensor, u: Tensor) -> Tensor:
    """Gray disks cover parts of it: ten of them, of a radius between one sixteenth and one ninth of the width."""
    y, x = _grid(images)
    column, row, size = u[:, : 3 * _DOTS, None, None].unflatten(1, (3, _DOTS)).unbind(1)  # [n, 10, 1, 1] each
    radius = 1 / 16 + (1 / 9 - 1 / 16) * size
    covered = ((x - column) ** 2 + (y - row) ** 2 < radius**2).any(1, keepdim=True)
    return torch.where(covered, 0.5, images)


def rotated(images: Tensor, u: Tensor) -> Tensor:
    """Turned by 90 degrees, anticlockwise."""
    return images.rot90(1, (2, 3))


def edges(images: Tensor, u: Tensor) -> Tensor:
    """The magnitude of its gradient (Sobel), over three so that a sharp edge is white."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 3
    channels = images.shape[1]
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    dx, dy = (functional.conv2d(padded, k.expand(channels, 1, 3, 3), groups=channels) for k in (kernel, kernel.T))
    return (dx**2 + dy**2).sqrt().clamp(0, 1)


def blocks(images: Tensor, u: Tensor) -> Tensor:
    """A mosaic of 4 x 4 cells, each with its contrast flipped at even odds."""
    height, width = images.shape[2:]
    flipped = (u[:, :16] < 0.5).float().view(-1, 1, 4, 4)
    mask = functional.interpolate(flipped, size=(height, width), mode="nearest")
    return torch.where(mask > 0, 1 - images, images)


def blur(images: Tensor, u: Tensor) -> Tensor:
    """Out of focus: a Gaussian of a sixteenth of the width."""
    sigma = images.shape[3] / 16
    reach = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = torch.exp(-(reach**2) / (2 * sigma**2))
    kernel, channels, half = kernel / kernel.sum(), images.shape[1], len(reach) // 2
    for shape, pad in (((1, -1), (half, half, 0, 0)), ((-1, 1), (0, 0, half, half))):
        weight = kernel.view(1, 1, *shape).expand(channels, 1, *kernel.view(shape).shape)
        images = functional.conv2d(functional.pad(images, pad, mode="replicate"), weight, groups=channels)
    return images


def mirror(images: Tensor, u: Tensor) -> Tensor:
    """Left and right exchanged."""
    return images.flip(3)


def negative(images: Tensor, u: Tensor) -> Tensor:
    """Dark ink on light paper."""
    return 1 - images


def pixelated(images: Tensor, u: Tensor) -> Tensor:
    """As a screen of eleven by eleven pixels would show it."""
    size = tuple(max(1, round(side * 11 / 32)) for side in images.shape[2:])
    coarse = functional.adaptive_avg_pool2d(images, size)
    return functional.interpolate(coarse, size=images.shape[2:], mode="nearest")


DOMAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": plain, "grating": grating, "dots": dots, "rotated": rotated, "edges": edges, "blocks": blocks, "blur": blur,
    "mirror": mirror, "negative": negative, "pixelated": pixelated}


def _names(domain: str) -> list[str]:
    """The domains that `domain` applies one after another; raises UserError for a name that is none."""
    names = [name.strip() for name in domain.split("+")]
    for name in names:
        if name not in DOMAINS:
            raise unknown("task_domains", name, DOMAINS)
    return names


def apply_domain(domain: str, images: Tensor, index: np.ndarray, seed: int, split: str) -> Tensor:
    """`images` uint8 `[n, 3, h, w]` as `domain` shows them; `index` int64 `[n]` are their places in the split."""
    shown = images.float() / 255
    for place, name in enumerate(_names(domain)):
        u = torch.from_numpy(uniforms(seed, "domain", split, place, name, index=index, count=DRAWS)).float()
        shown = DOMAINS[name](shown, u)
    return (shown * 255).round().clamp(0, 255).to(torch.uint8)


def first_appearances(domains: list[str]) -> list[bool]:
    """The right growth decision for every task: keep where a domain appears for the first time."""
    return [domain not in domains[:task] for task, domain in enumerate(domains)]


def check_domains(domains: list[str] | None, tasks: int, own: Collection[str] = ()) -> list[str] | None:
    """The domains of the first `tasks` tasks, spelled without blanks, so that one domain is one text; raises UserError for a
    name that is none or a list that is too short. A data set with domains of its `own` is shown in these alone."""
    if domains is None:
        return None
    domains = [domain.strip() if own else "+".join(_names(domain)) for domain in domains]
    for domain in domains:
        if own and domain not in own:
            raise unknown("task_domains", domain, own)
    if len(domains) < tasks:
        raise UserError(f"task_domains: it has {len(domains)} entries for {tasks} tasks; give one domain for every task.")
    return domains[:tasks]


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel's middle as a share of the image, `[1, h, w]` each."""
    height, width = images.shape[2:]
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return y.view(1, -1, 1).expand(1, height, width), x.view(1, 1, -1).expand(1, height, width)
