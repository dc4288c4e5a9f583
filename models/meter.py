"""What an epoch has come to so far, kept on the device and watched for numbers that are not finite."""

from typing import Any

import torch
from torch import Tensor

WATCHED = ("loss", "gradient", "gate")  # in the order in which the first one that is not finite is named


class Meter:
    """Running sums of an epoch on the device, read only when they are shown: reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, clf, sparse, correct
        self.bad = torch.full((2,), -1, dtype=torch.long, device=device)  # first step that was not finite, and what in it
        self.steps = self.images = 0

    def add(self, clf: Tensor, sparse: Tensor, correct: Tensor, images: int) -> None:
        """One optimizer step: mean losses, number of correct predictions, number of images."""
        self.sums += torch.stack([(clf + sparse).double(), clf.double(), sparse.double(), correct.double()]).detach()
        self.steps += 1
        self.images += images

    def watch(self, step: int, loss: Tensor, gradients: list[Tensor], gate: Tensor | None) -> Tensor:
        """Notes the first step at which one of `WATCHED` is not finite; returns whether this one is, on the device."""
        norm = torch.nn.utils.get_total_norm(gradients)
        gate = norm.new_zeros(()) if gate is None else gate.detach().sum()
        finite = torch.stack([value.detach().double() for value in (loss, norm, gate)]).isfinite()
        first = torch.stack([torch.full_like(self.bad[0], step), (~finite).long().argmax()])
        self.bad = torch.where((self.bad < 0) & ~finite.all(), first, self.bad)
        return finite.all()

    def first_bad(self) -> tuple[int, str] | None:
        """Step and name of the first number that was not finite, None if all were; waits for the device."""
        step, what = self.bad.tolist()
        return None if step < 0 else (step, WATCHED[what])

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"sums": self.sums.clone(), "steps": self.steps, "images": self.images}

    def load(self, state: dict[str, Any]) -> None:
        """The sums as they were at `state`."""
        self.sums.copy_(state["sums"])
        self.steps, self.images = state["steps"], state["images"]

    def read(self) -> dict[str, float]:
        """Mean losses and the accuracy in percent since the meter was made."""
        loss, clf, sparse, correct = self.sums.tolist()
        steps = max(self.steps, 1)
        return {"loss": loss / steps, "clf": clf / steps, "sparse": sparse / steps,
                "accuracy": 100 * correct / max(self.images, 1)}
