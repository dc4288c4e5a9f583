"""Makes the weights of the embedded backbone: `python -m tools.pretrain_embedded`.

A small vision transformer learns to tell several hundred printed characters apart, none of which is a class of the
data sets `glyphs` and `digits` or looks like one, in the training faces of `utils/data/glyphs.py`. They are printed more
cleanly than those of `glyphs`: features that have seen all of its jitter leave an adapter nothing to do. The defaults
made the shipped file, in five minutes on one core. `--evaluate` measures a file instead of making one.
"""

import argparse
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from backbone.embedded import EMBEDDED, WEIGHTS
from utils.data.digits import load_digits
from utils.data.glyphs import CHARACTERS, FACES, TEST_FACES, TEST_PER_FACE, TRAIN_FACES, drawing, has, load_glyphs, render
from utils.errors import UserError, status_of
from utils.rng import generator, stream_seed

Images = tuple[torch.Tensor, np.ndarray]  # uint8 [n, 3, 32, 32] and labels int64 [n]

DIGITS = "0123456789"
MIN_FACES = 9  # a character is worth a class if so many training faces have it
LOOK_ALIKE = 0.9  # cosine of two drawings brought to one size, from which on they count as one character
_SHAPE = 24  # pixels to a side of a drawing brought to one size
_LABEL_SMOOTHING = 0.1
_WARMUP = 0.05  # of all steps
_FINETUNE_EPOCHS = 16


def pretraining_characters() -> list[str]:
    """Letters, punctuation and symbols of at least `MIN_FACES` training faces that no data set has.

    Left out are the classes of `glyphs` and `digits`, whatever looks like one of them in any face at any size
    (Cyrillic A, Greek Omicron, small c), whatever is composed of such (A with a grave accent, one half), and of
    several characters that look alike all but the first.
    """
    classes = CHARACTERS + DIGITS
    candidates = [
        character
        for character in map(chr, range(33, 0xE000))
        if _is_printed(character)
        and not set(unicodedata.normalize("NFKD", character)) & set(classes)
        and sum(has(face, character) for face in TRAIN_FACES) >= MIN_FACES
    ]
    everything = [*classes, *candidates]
    alike = _alike(everything)
    taken, refused = list(range(len(classes))), set(classes)
    for index in range(len(classes), len(everything)):
        character = everything[index]
        parts = set(unicodedata.normalize("NFKD", character))
        if parts & refused or alike[index, [index, *taken]].any():
            refused.add(character)
        else:
            taken.append(index)
    return [everything[index] for index in taken[len(classes) :]]


def _is_printed(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LPNS" and category != "Lm"


def _alike(characters: Sequence[str]) -> np.ndarray:
    """Bool `[n, n]`: whether two characters look alike in some face; on the diagonal, whether one is blank."""
    alike = np.zeros((len(characters), len(characters)), dtype=bool)
    for face in FACES:
        present = np.array([index for index, character in enumerate(characters) if has(face, character)])
        shapes = _shapes([drawing(characters[index], face) for index in present])
        similar = shapes @ shapes.T >= LOOK_ALIKE
        np.fill_diagonal(similar, ~shapes.any(axis=1))
        alike[np.ix_(present, present)] |= similar
    return alike


def _shapes(drawings: Sequence[np.ndarray]) -> np.ndarray:
    """Each drawing's ink cut out, brought to one size with its proportions kept, blurred, of norm 1 or all 0: `[n, 576]`."""
    squares = torch.from_numpy(np.stack([_square(drawing) for drawing in drawings])).double()
    blurred = functional.avg_pool2d(squares[:, None], 3, stride=1, padding=1).flatten(1)
    return functional.normalize(blurred, dim=1).numpy()


def _square(ink: np.ndarray) -> np.ndarray:
    square = Image.new("L", (_SHAPE, _SHAPE))
    box = Image.fromarray(ink).getbbox()
    if box:
        cut = Image.fromarray(ink).crop(box)
        width, height = (max(1, round(side * _SHAPE / max(cut.size))) for side in cut.size)
        square.paste(cut.resize((width, height), Image.Resampling.BOX), ((_SHAPE - width) // 2, (_SHAPE - height) // 2))
    return np.asarray(square)


def fresh_model(classes: int, seed: int) -> nn.Module:
    """The embedded architecture with first weights that depend on `seed` alone.

    timm's positions and patch projection are made for normalised images and long training; larger ones, for images
    that are mostly 0, take the loss off its first plateau in hundreds of steps rather than thousands.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "pretrain", "weights"))  # timm draws from the global stream
        model = timm.create_model(EMBEDDED, num_classes=classes)
        with torch.no_grad():
            model.pos_embed.normal_(std=0.2)
            model.patch_embed.proj.weight.mul_(3.0)
    return model


def train(
    model: nn.Module, draw: Callable[[int], Images], *, epochs: int, batch_size: int, lr: float, seed: int
) -> None:
    """Cross-entropy on the images that `draw(epoch)` gives; AdamW, a warm-up, a cosine down to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    began = time.monotonic()
    model.train()
    for epoch in range(epochs):
        images, labels = draw(epoch)
        steps = math.ceil(len(labels) / batch_size)
        total = 0.0
        batches = _batches(images, labels, batch_size, generator(seed, "pretrain", "order", epoch))
        for step, (batch, targets) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule((epoch + step / steps) / epochs)
            loss = functional.cross_entropy(model(batch), targets, label_smoothing=_LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(targets)
        seconds = time.monotonic() - began
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(labels):.3f}  {seconds:.0f} s", flush=True)


def _schedule(progress: float) -> float:
    """The factor of the learning rate when so large a part of the training is done."""
    if progress < _WARMUP:
        return (progress + 1e-3) / (_WARMUP + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - _WARMUP) / (1.0 - _WARMUP)))


def _batches(
    images: torch.Tensor, labels: np.ndarray, size: int, order: torch.Generator | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images float32 `[b, 3, 32, 32]` in 0..1 and labels int64 `[b]`, in the order that `order` draws."""
    targets = torch.from_numpy(labels)
    picks = torch.arange(len(labels)) if order is None else torch.randperm(len(labels), generator=order)
    for pick in picks.split(size):
        yield images[pick].float() / 255, targets[pick]


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: np.ndarray) -> float:
    """Percent of the images that the model's own head names correctly."""
    model.eval()
    right = [model(batch).argmax(1) == targets for batch, targets in _batches(images, labels, 256)]
    return 100.0 * torch.cat(right).double().mean().item()


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the head of a timm model reads, float32 `[n, width]`."""
    model.eval()
    batches = (batch for batch, _ in _batches(images, np.zeros(len(images), dtype=np.int64), 256))
    return torch.cat([model.forward_head(model.forward_features(batch), pre_logits=True) for batch in batches])


def nearest_class_mean(
    model: nn.Module,
    train_images: torch.Tensor,
    train_labels: np.ndarray,
    images: torch.Tensor,
    labels: np.ndarray,
) -> float:
    """Percent of the images whose feature is closest, by cosine, to the mean training feature of their class."""
    known = functional.normalize(features(model, train_images), dim=1)
    classes = torch.from_numpy(train_labels)
    means = torch.stack([known[classes == label].mean(0) for label in range(int(classes.max()) + 1)])
    cosines = functional.normalize(features(model, images), dim=1) @ functional.normalize(means, dim=1).T
    return 100.0 * float((cosines.argmax(1).numpy() == labels).mean())


def report(model: nn.Module) -> None:
    """Prints what the frozen features are worth on the two data sets that they were not trained on."""
    for name, load in (("glyphs", load_glyphs), ("digits", load_digits)):
        train_images, train_labels, images, labels, _ = load()
        percent = nearest_class_mean(model, train_images, train_labels, images, labels)
        print(f"nearest class mean on {name}: {percent:.1f} %", flush=True)


def make(options: argparse.Namespace) -> None:
    """Pretrains, prints the accuracies and writes the file."""
    characters = pretraining_characters()
    print(f"{len(characters)} characters in {len(TRAIN_FACES)} faces", flush=True)
    model = fresh_model(len(characters), options.seed)

    def draw(epoch: int) -> Images:
        seed = stream_seed(options.seed, "pretrain", "images", epoch)
        return render(characters, TRAIN_FACES, options.per_face, seed, options.jitter)

    train(model, draw, epochs=options.epochs, batch_size=options.batch_size, lr=options.lr, seed=options.seed)
    test_seed = stream_seed(options.seed, "pretrain", "test")
    unseen = accuracy(model, *render(characters, TEST_FACES, TEST_PER_FACE, test_seed, options.jitter))
    print(f"accuracy on unseen faces: {unseen:.1f} %", flush=True)
    report(model)
    settings = {name: getattr(options, name) for name in ("epochs", "per_face", "jitter", "batch_size", "lr", "seed")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy", "matplotlib"))
    metadata = {
        "command": f"python -m tools.pretrain_embedded {flags}",
        "seed": str(options.seed),
        "classes": str(len(characters)),
        "characters": "".join(characters),
        "accuracy_on_unseen_faces": f"{unseen:.2f}",
        "versions": versions,
    }
    save(model, options.out, metadata)
    print(f"wrote {options.out}")


def save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """The backbone without its head as float32 safetensors, written under another name and renamed."""
    state = model.state_dict()
    tensors = {name: value.contiguous() for name, value in state.items() if not name.startswith("head.")}
    partial_file = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file.write_bytes(safetensors.torch.save(tensors, metadata))
        partial_file.replace(path)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); choose another file.") from error


def evaluate(path: Path, finetune: bool, seed: int) -> None:
    """Prints what the file at `path` is worth; with `finetune` also what it reaches when all of it is trained."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        message = f"--out: {path} is not a readable safetensors file; run without --evaluate to make it."
        raise UserError(message) from error
    print(f"accuracy on unseen faces: {metadata.get('accuracy_on_unseen_faces', 'not recorded')} %")
    load = partial(timm.create_model, EMBEDDED, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    try:
        model = load()
    except RuntimeError as error:  # other names or shapes
        raise UserError(f"--out: {path} holds other weights than those of {EMBEDDED}; name a file that this tool made."
                        ) from error
    report(model)
    if finetune:
        train_images, train_labels, images, labels, names = load_glyphs()
        model = load(num_classes=len(names))
        nn.init.zeros_(model.head.weight)
        train(model, lambda _: (train_images, train_labels), epochs=_FINETUNE_EPOCHS, batch_size=64, lr=1e-3, seed=seed)
        print(f"all weights trained on glyphs: {accuracy(model, images, labels):.1f} %")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretrain_embedded",
        description="Pretrain the embedded backbone on printed characters that no data set uses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=6, help="passes over all characters")
    parser.add_argument("--per-face", type=int, default=5, help="images of a character per face and epoch")
    parser.add_argument("--jitter", type=float, default=0.35, help="strength of the jitter; the data set glyphs has 1")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights, the images and their order")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="safetensors file to write, or to measure")
    parser.add_argument("--evaluate", action="store_true", help="measure the file instead of making it")
    parser.add_argument("--finetune", action="store_true", help="with --evaluate: also train all of it on glyphs")
    options = parser.parse_args(argv)
    for name in ("epochs", "per_face", "batch_size", "lr"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}.")
    if not 0 <= options.jitter <= 1:
        raise UserError(f"--jitter must be between 0 and 1, not {options.jitter}.")
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out must name a .safetensors file, not '{options.out}'.")
    if options.finetune and not options.evaluate:
        raise UserError("--finetune only measures a file: give --evaluate with it.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    torch.set_num_threads(1)  # sums, and so the last bits of the file, depend on the number of threads

    def work() -> None:
        options = _options(argv)
        if options.evaluate:
            evaluate(options.out, options.finetune, options.seed)
        else:
            make(options)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
