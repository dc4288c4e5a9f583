"""What a run leaves behind after each task, and the network that anyone can rebuild from it (METHOD.md, section 5)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from backbone import FrozenViT, create_backbone
from backbone.gates import GATES
from backbone.heads import HEADS
from backbone.lora import AdapterBank, inject
from utils.config import Config
from utils.errors import UserError
from utils.runs.files import read_sealed_json, sha256_of, write_safetensors, write_torch

if TYPE_CHECKING:
    from models.sdlora import SDLoRA


def beta_record(values: Tensor, tasks: Sequence[int], task: int) -> Tensor:
    """Values `[n, ...]` of the active adapters as float32 `[task + 1, ...]` on the CPU, 0 where an adapter was pruned."""
    record = torch.zeros(task + 1, *values.shape[1:])
    record[list(tasks)] = values.detach().float().cpu()
    return record


def save_task(folder: Path, learner: "SDLoRA") -> list[Path]:
    """Writes gate, adapter and head of the learner's current task; adapters first, so that the gate file's presence means
    that all it refers to is there."""
    task, bank, config = learner.task, learner.bank, learner.config
    written = []
    if task in bank.tasks:
        identity = learner.backbone.identity
        metadata = {"task": str(task), "rank": str(bank.ranks[bank.tasks.index(task)]), "backbone": identity.name,
                    "backbone_tag": identity.tag, "backbone_sha256": identity.sha256}
        written.append(folder / f"adapter_task_{task}.safetensors")
        write_safetensors(written[-1], {name: t.float() for name, t in bank.direction(task).items()}, metadata)
    written += [save_head(folder, learner.head, task), folder / f"beta_values_task_{task}.pt"]
    logits = beta_record(learner.gate.logits, bank.tasks, task)
    logits[[t for t in range(task + 1) if t not in bank.tasks]] = float("-inf")
    write_torch(written[-1], {
        "beta_values": learner.decision_beta.clone(),
        "pruning_mask": learner.pruning_mask(),
        "beta_after": learner.beta_after(),
        "alphas": beta_record(bank.magnitudes(), bank.tasks, task),
        "gate_logits": logits,
        "gate_scale": learner.gate.scale,
        "task_id": task,
        "threshold": config.growth_threshold,
        "tau": config.gumbel_tau_final,
        "growth_rule": config.growth_rule,
        "kept": task in bank.tasks,
    })
    return written


class Head(Protocol):
    """What `save_head` wants of a head: a name in `HEADS`, and the tensors from which that head predicts."""

    kind: str

    def to_file(self) -> dict[str, Tensor]: ...


def save_head(folder: Path, head: Head, task: int) -> Path:
    """Writes `head_task_<task>.safetensors`: what predicts every class seen so far."""
    path = folder / f"head_task_{task}.safetensors"
    write_safetensors(path, head.to_file(), {"task": str(task), "head": head.kind})
    return path


class SavedNetwork(nn.Module):
    """The network of one task of a finished run: images `[b, 3, S, S]` in 0..1 (normalised if the run's config says so) to
    logits `[b, classes seen]` in the order of the stream.

    bank: the adapters in it, None where the method has none; `bank.merge(beta)` gives it other gate weights.
    """

    def __init__(self, backbone: nn.Module, bank: AdapterBank | None, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.bank, self.head = backbone, bank, head

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def load_network(folder: str | Path, task: int) -> SavedNetwork:
    """Rebuilds the network that was evaluated after `task` from the files in `folder`, by equation 1, in float32.

    The frozen backbone is loaded as the run's config names it. Raises UserError if a file is missing or not, to the bit, what
    the run wrote, or if the backbone's weights are not those of the run.
    """
    folder = Path(folder)
    result = read_sealed_json(_existing(folder / "results.json"))
    if not 0 <= task < len(result["tasks"]):
        raise UserError(f"{folder}: task {task} has not been finished there; its tasks are 0 to {len(result['tasks']) - 1}.")
    written = {name: digest for record in result["tasks"][:task + 1] for name, digest in record["files"].items()}

    def whole(name: str) -> Path:
        path = _existing(folder / name)
        if sha256_of(path) != written.get(name):
            raise UserError(f"{path}: is not the file that the run wrote (its checksum does not fit); restore it from a copy.")
        return path

    config = Config.model_validate(result["config"])
    head_file = whole(f"head_task_{task}.safetensors")
    gate_file = f"beta_values_task_{task}.pt"  # methods without adapters write none
    record = torch.load(whole(gate_file)) if gate_file in written else None
    backbone = create_backbone(config)
    if backbone.identity.sha256 != result["backbone"]["sha256"]:
        raise UserError(f"{folder}: the backbone that was loaded has other weights than '{config.backbone_type}' had in the "
                        "run; put the run's weights where they were.")
    bank = None if record is None else _merge_adapters(backbone, config, record, whole)
    with safe_open(head_file, framework="pt") as file:
        head = HEADS[(file.metadata() or {}).get("head", "linear")](backbone.width, config, result["seed"])
        head.from_file({name: file.get_tensor(name) for name in file.keys()})
    return SavedNetwork(backbone, bank, head)


def _merge_adapters(backbone: FrozenViT, config: Config, record: dict[str, Any], whole: Callable[[str], Path]) -> AdapterBank:
    """Merges the adapters that the gate file `record` says are in force into the frozen weights; `whole` finds files."""
    bank = AdapterBank(inject(backbone.vit, config.backbone_type), GATES[config.gate](), "layer")
    tasks = [t for t in range(record["task_id"] + 1) if record["pruning_mask"][t]]
    for t in tasks:
        bank.store(t, load_file(whole(f"adapter_task_{t}.safetensors")), record["alphas"][t])
    bank.gate.scale = record["gate_scale"]
    bank.merge(record["beta_after"][tasks])
    return bank


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name the folder of a run and a task that it has finished.")
    return path
