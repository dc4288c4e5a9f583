"""What a run leaves behind after each task, and the network that anyone can rebuild from it (METHOD.md, section 5)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from backbone import FrozenViT, create_backbone
from backbone.gates import OpenGate
from backbone.heads import HEADS
from backbone.lora import AdapterBank, inject, merged_copy
from utils.config import config_of_record
from utils.data.sets import READERS
from utils.data.sources import TestView
from utils.errors import UserError, unknown
from utils.rng import generator
from utils.runs.files import read_sealed_json, sha256_of, write_safetensors

_CLOSE = {"fp32": 1e-3, "bf16": 0.1}  # how far a rebuilt network's logits may be from the run's, over the largest


class SavedNetwork(nn.Module):
    """The network of one task of a finished run: images `[b, 3, S, S]` in 0..1 (normalised if the run's config says so) to
    logits `[b, classes seen]` in the order of the stream.

    bank: the adapters in it, None where the method has none; beta: their gate weights in force, in the bank's order.
    """

    def __init__(self, backbone: nn.Module, bank: AdapterBank | None, head: nn.Module, beta: Tensor | None = None) -> None:
        super().__init__()
        self.backbone, self.bank, self.head = backbone, bank, head
        self.register_buffer("beta", beta, persistent=False)

    @contextmanager
    def without(self, adapter: int) -> Iterator[None]:
        """The network with the gate weight of one of its adapters, by task, at 0 and the others as they are."""
        others = self.beta.clone()
        others[self.bank.tasks.index(adapter)] = 0
        self.bank.merge(others)
        try:
            yield
        finally:
            self.bank.merge(self.beta)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    # ---- in forms that need nothing of this repository

    def as_timm(self) -> nn.Module:
        """timm's own network that gives the same features, adapters merged and without the head; raises UserError where no
        single one does."""
        return self.backbone.as_timm()

    def gate_weights(self) -> dict[int, float]:
        """The gate weights in force, by the tasks of the adapters; raises UserError where not all images meet the same."""
        return {} if self.bank is None else dict(zip(self.bank.tasks, self.beta.tolist(), strict=True))

    def as_graph(self) -> nn.Module:
        """The network as a module whose operations are the same whatever the images, so that it can be traced."""
        return nn.Sequential(merged_copy(self.backbone), self.head)

    def met(self) -> list[str]:
        """Which network each image of the last call has met, in words; empty where there is one for all."""
        return []


class SavedRun:
    """The files of a run after `task` (default: the newest), each handed out only if it is, to the bit, what the run wrote.

    Raises UserError for a folder without a run, and a task that it has not finished. config, seed: those of the run.
    class_token_alone: whether the learner of the run has read its backbone so.
    """

    def __init__(self, folder: str | Path, task: int | None = None, class_token_alone: bool = False) -> None:
        self.folder, self._class_token_alone = Path(folder), class_token_alone
        self.result: dict[str, Any] = read_sealed_json(_existing(self.folder / "results.json", "name the folder of a run"))
        tasks = self.result["tasks"]
        self.task = task = len(tasks) - 1 if task is None else task
        if not tasks:
            raise UserError(f"{folder}: no task has been finished there; run its command again.")
        if not 0 <= task < len(tasks):
            raise UserError(f"{folder}: task {task} has not been finished there; its tasks are 0 to {len(tasks) - 1}.")
        self.config = config_of_record(self.result["config"], str(self.folder / "results.json"))
        self.seed: int = self.result["seed"]
        self._sums = {name: digest for record in tasks[:task + 1] for name, digest in record["files"].items()}
        self._unread = set(tasks[task]["files"])

    def file(self, name: str) -> Path:
        """The whole file `name`; raises UserError for one that is missing or has changed."""
        path = _existing(self.folder / name, "restore it from a copy")
        if sha256_of(path) != self._sums.get(name):
            raise UserError(f"{path}: is not the file that the run wrote (its checksum does not fit); restore it from a copy.")
        self._unread.discard(name)
        return path

    def class_names(self) -> list[str]:
        """Names of the classes that the task's network tells apart, as the data set has them, in the order of its logits.

        The record of an older run has none: they are taken from its split.json, and without that the data set's own numbers of
        the classes stand for them.
        """
        names = self.result.get("class_names") or self._names_in_split() or [
            f"class {number}" for number in self.result["class_order"]]
        return names[:self.result["tasks"][self.task]["seen_classes"]]

    def _names_in_split(self) -> list[str] | None:
        """The names in split.json, None where that is not the run's or not there."""
        with suppress(OSError, ValueError, KeyError, AttributeError):
            record = json.loads((self.folder / "split.json").read_bytes())
            if record["sha256"] == self.result.get("split_sha256"):
                return record.get("class_names")
        return None

    def test_view(self) -> TestView:
        """How the run has seen its test images. An older record does not say it: that of its data set's files, then."""
        if "test_view" in self.result:
            if self.result["test_view"] is None:
                raise UserError(f"{self.folder}: the run's data sets {', '.join(self.config.dataset)} show their test images "
                                "in different ways, so there is no single one for other images; take a run on one of them.")
            return TestView(**self.result["test_view"])
        backbone, name = self.backbone(), self.config.dataset
        if name not in READERS:
            raise unknown("dataset", name, READERS)
        mean, std = backbone.mean_std if self.config.normalize == "backbone" else (None, None)
        return TestView(backbone.image_size, READERS[name][0].test_resize, True, mean, std)

    def backbone(self) -> FrozenViT:
        """The frozen backbone as the run's config names it; raises UserError if its weights are not those of the run."""
        backbone = create_backbone(self.config)
        if backbone.identity.sha256 != self.result["backbone"]["sha256"]:
            raise UserError(f"{self.folder}: the backbone that was loaded has other weights than "
                            f"'{self.config.backbone_type}' had in the run; put the run's weights where they were.")
        if self._class_token_alone:  # else the last bits of a handful of images would be others than the run's
            backbone.read_class_token_alone()
        return backbone

    def head(self, width: int) -> nn.Module:
        """The head of the task, for features of `width`."""
        with safe_open(self.file(f"head_task_{self.task}.safetensors"), framework="pt") as file:
            kind = (file.metadata() or {}).get("head", "linear")
            head = HEADS[kind].unfilled(width, self.seed)
            head.from_file({name: file.get_tensor(name) for name in file.keys()})
        return head

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        return load_file(self.file(name))

    def gates(self) -> dict[str, Any]:
        """What the gate file of the task holds."""
        return torch.load(self.file(f"beta_values_task_{self.task}.pt"))

    def adapters(self, backbone: FrozenViT) -> tuple[AdapterBank, Tensor]:
        """The adapters that are in force after the task, merged into the frozen weights by equation 1, and their gate weights.
        """
        record = self.gates()
        bank = AdapterBank(inject(backbone.vit, self.config.backbone_type), OpenGate(), "layer")
        tasks = [t for t in range(self.task + 1) if record["pruning_mask"][t]]
        for t in tasks:
            bank.store(t, self.tensors(f"adapter_task_{t}.safetensors"), record["alphas"][t])
        bank.gate.scale = record["gate_scale"]
        beta = record["beta_after"][tasks]
        bank.merge(beta)
        return bank, beta

    def check(self, network: nn.Module) -> None:
        """Raises UserError if `network` is not the one that the run evaluated: a file of the task was not read, or the logits
        that the run noted (`BaseLearner.probe`; runs of older versions and committed records have none) are others."""
        method = f"{self.folder}: the run's model_name '{self.config.model_name}'"
        if self._unread:
            raise UserError(f"{method} has written {', '.join(sorted(self._unread))}, which its class does not read; give the "
                            "class a 'rebuild' that reads all that its 'save' writes.")
        noted = self.result["tasks"][self.task].get("probe")
        if noted is None:
            return
        expected, size = torch.tensor(noted), network.backbone.image_size
        with torch.no_grad():
            found = network(torch.rand(len(expected), 3, size, size, generator=generator(0, "probe"))).float()
        close = _CLOSE[self.config.precision] * expected.abs().max()
        if found.shape != expected.shape or not (found - expected).abs().max() <= close:
            raise UserError(f"{method} evaluated another network than the one its files give: it has learned something that "
                            "is not saved or not read; give its class a 'save' and a 'rebuild' of its own.")


def beta_record(values: Tensor, tasks: Sequence[int], task: int) -> Tensor:
    """Values `[n, ...]` of the active adapters as float32 `[task + 1, ...]` on the CPU, 0 where an adapter was pruned."""
    record = torch.zeros(task + 1, *values.shape[1:])
    record[list(tasks)] = values.detach().float().cpu()
    return record


def save_adapter(folder: Path, bank: AdapterBank, task: int, backbone: FrozenViT) -> Path:
    """Writes `adapter_task_<task>.safetensors`: the direction of a stored adapter."""
    path, identity = folder / f"adapter_task_{task}.safetensors", backbone.identity
    metadata = {"task": str(task), "rank": str(bank.ranks[bank.tasks.index(task)]), "backbone": identity.name,
                "backbone_tag": identity.tag, "backbone_sha256": identity.sha256}
    write_safetensors(path, {name: tensor.float() for name, tensor in bank.direction(task).items()}, metadata)
    return path


class Head(Protocol):
    """What `save_head` wants of a head: a name in `HEADS`, and the tensors from which that head predicts."""

    kind: str

    def to_file(self) -> dict[str, Tensor]: ...


def save_head(folder: Path, head: Head, task: int) -> Path:
    """Writes `head_task_<task>.safetensors`: what predicts every class seen so far."""
    path = folder / f"head_task_{task}.safetensors"
    write_safetensors(path, head.to_file(), {"task": str(task), "head": head.kind})
    return path


def _existing(path: Path, advice: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; {advice}.")
    return path
