"""What several tests share: small learners and runs, records of runs, and equation 1 of METHOD.md written out."""

import copy
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import trainer
from backbone.embedded import EMBEDDED
from backbone.gates import Gate, GumbelGate
from backbone.lora import AdapterBank, inject
from benchmarks.references import loop_layers
from models import LEARNERS, BaseLearner
from models.base import Session
from tests.tiny_backbone import TINY
from trainer import Quiet, build, run
from utils.config import Config, config_from_dict
from utils.config.components import chosen, config_class
from utils.results.metrics import TaskCounts, summary
from utils.results.plots import write_pictures
from utils.rng import generator
from utils.runs.distributed import parts_of_batches
from utils.runs.files import write_sealed_json
from utils.runs.folder import committed_form

ROOT = Path(__file__).resolve().parent.parent
LONG = os.environ.get("GCL_LONG_FAULTS") == "1"  # whether tests take their long form

# ---- small learners on the digits: one thread, one epoch, a few tasks

SMALL = {"dataset": "digits", "init_cls": 2, "increment": 2, "nb_tasks": 3, "backbone_type": EMBEDDED, "init_epoch": 1,
         "epochs": 1, "batch_size": 32, "init_lr": 0.01, "lrate": 0.01, "gate_lr": 0.2, "rank": 4, "device": "cpu"}
PRETRAINED = {"backbone_type": EMBEDDED, "pretrained": True}


def small_values(**changes: Any) -> dict[str, Any]:
    """`SMALL` with `changes`, without the keys that mean nothing for what they choose."""
    fields = config_class(chosen({**SMALL, **changes})).model_fields
    return {**{key: value for key, value in SMALL.items() if key in fields}, **changes}


def small_config(folder: Path | str = "./unused/", **changes: Any) -> Config:
    """A config that trains in seconds."""
    return config_from_dict({**small_values(**changes), "filepath": str(folder)})


# What a method wants of a run as small as these; most want nothing.
OF_METHOD: dict[str, dict[str, Any]] = {
    "l2p": {"pool_size": 6, "prompt_length": 2, "top_k": 3, "init_lr": 0.5, "lrate": 0.5},
    "dualprompt": {"general_blocks": [0], "expert_blocks": [0, 1], "general_length": 2, "expert_length": 3},
    "codaprompt": {"prompt_components": 6, "prompt_length": 4, "prompt_blocks": [0, 1], "ortho_mu": 0.1},
    "litelora": {"batch_size_p2": 32},
    "sema": {"growing_share": 1.0, "rd_epochs": 2, "rd_dim": 8, "expansion_threshold": 0.0, "detect_batch_size": 32},
    "ranpac": {"ridge_dim": 64},
}


def method_values(name: str, **changes: Any) -> dict[str, Any]:
    """Values of a config with which the method `name` learns two tasks in a second."""
    return small_values(**{**TINY, "nb_tasks": 2, "model_name": name, **OF_METHOD.get(name, {}), **changes})


def tiny_config(folder: Path | str = "./unused/", **changes: Any) -> Config:
    """As `small_config`, on the network of tests/tiny_backbone.py: a tenth of the time, where no accuracy matters."""
    return small_config(folder, **{**TINY, **changes})


def learner_of(config: Config, session: Session | None = None) -> BaseLearner:
    """The config's learner on its data, before the first task; without a `session` nobody evaluates or interrupts it."""
    backbone, data = build(config, config.seed[0], torch.device("cpu"))
    kind = LEARNERS[config.model_name]
    learner = kind(config, kind.stream(data), backbone, config.seed[0], session or Quiet())
    if isinstance(session, Watch):
        session.learner = learner
    return learner


def learn(learner: BaseLearner, tasks: range, end_last: bool = True) -> BaseLearner:
    """Takes the learner through `tasks`; without `end_last` the last one stays undecided."""
    for task in tasks:
        learner.begin_task(task)
        learner.train()
        if end_last or task + 1 < tasks.stop:
            learner.end_task()
    return learner


def in_batches(features: Tensor, labels: Tensor, size: int = 7, part: tuple[int, int] = (0, 1)
               ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a head collects of a task whose images have these features `[n, d]` and labels, by process `part` (k, n)."""
    for own in parts_of_batches(len(labels), size, part):
        yield features[own.start:own.stop], labels[own.start:own.stop], torch.arange(own.start, own.stop)


def grown(learner: BaseLearner, tasks: range, begin_next: bool = False) -> BaseLearner:
    """As `learn`, without training: the adapters' B is random instead. `begin_next`: the task after `tasks` has begun."""
    for task in tasks:
        learner.begin_task(task)
        randomize(learner)
        learner.end_task()
    if begin_next:
        learner.begin_task(tasks.stop)
        randomize(learner)
    return learner


@contextmanager
def pictures() -> Iterator[None]:
    """Within it runs in this process draw their pictures, which tests/conftest.py keeps them from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", write_pictures)
        yield


def refusal(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence on stderr with which a command refuses its arguments: it must end with status 2."""
    assert command([str(argument) for argument in arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ") and "Traceback" not in text
    return text


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Returns once the condition holds; fails if that takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def once(condition: Callable[[], Any], act: Callable[[], Any]) -> None:
    """Acts, from a thread, once the condition holds."""
    threading.Thread(target=lambda: (wait_for(condition), act()), daemon=True).start()


class Interrupted(Exception):
    """What a `Watch` raises."""


class Watch(Quiet):
    """A session that evaluates when it is asked to, and notes all work. `stop_at`: the call of `after_step` or `work` at which
    it raises Interrupted."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.evaluated: list[int] = []  # classes seen at every evaluation
        self.stop_at, self.learner = stop_at, None

    def evaluate(self) -> float:
        self.evaluated.append(logits(self.learner).shape[1])
        return 0.0

    def after_step(self) -> None:
        self.work("step", 0, 1)

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        self.calls.append(title)
        if len(self.calls) == self.stop_at:
            raise Interrupted


@torch.no_grad()
def randomize(learner: BaseLearner) -> None:
    """The current adapter looks trained."""
    if learner.bank.current is not None:
        learner.bank.new_B.copy_(torch.randn(learner.bank.new_B.shape, generator=generator(learner.task, "B")) * 0.1)


def resumed(learner: BaseLearner, session: Session | None = None) -> BaseLearner:
    """A new learner that goes on from the state of `learner`, by way of a file."""
    file = io.BytesIO()
    torch.save(learner.state(), file)
    again = learner_of(learner.config, session)
    again.load_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return again


def test_images(learner: BaseLearner, count: int = 32) -> Tensor:
    """The first test images of the stream's first classes."""
    return next(iter(learner.data.eval_batches("test", learner.data.task_classes(0), count)))[0]


test_images.__test__ = False


def logits(learner: BaseLearner) -> Tensor:
    """Logits of `test_images` by the network as it is evaluated, in its precision."""
    learner.start_evaluation()
    return learner.predict(test_images(learner).to(next(learner.backbone.parameters()).dtype))


def in_float64(learner: BaseLearner) -> None:
    """Turns network and adapters to double precision, to compare outputs closely."""
    learner.backbone.double()
    for module in learner.modules():
        module.double()


def with_images_in_float64(learner: BaseLearner, per_class: int = 20) -> BaseLearner:
    """`in_float64`, and the batches of the learner's stream too, which keeps so many training images of each class."""
    in_float64(learner)
    learner.data._members["train"] = [members[:per_class] for members in learner.data._members["train"]]
    given = learner.data._batches
    learner.data._batches = lambda *args: (images.double() for images in given(*args))
    return learner


def everything(learner: BaseLearner) -> list[Tensor]:
    """All that has been learned."""
    return [*learner.stored_tensors(), *(tensor for module in learner.modules() for tensor in module.buffers())]


def same(mine: BaseLearner, theirs: BaseLearner) -> bool:
    """Whether two learners have learned the same, to the bit."""
    pairs = zip(everything(mine), everything(theirs), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs) and torch.equal(logits(mine), logits(theirs))


# ---- equation 1 adapter by adapter: what the fast code is held against


def tiny_vit(seed: int = 0, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    """A frozen ViT with 2 blocks of width 32 for 16x16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return vit.requires_grad_(False).eval().to(dtype)


def images(count: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random images for `tiny_vit`."""
    return torch.rand(count, 3, 16, 16, generator=generator(seed, "images"), dtype=dtype)


def bank_on(vit: nn.Module, gate: type[Gate] = GumbelGate, scope: str = "layer") -> AdapterBank:
    """An empty bank injected into `vit`, in its precision."""
    return AdapterBank(inject(vit, "tiny"), gate(), scope).to(next(vit.parameters()).dtype)


def trained(bank: AdapterBank, task: int, logit: float = 0.0, rank: int = 3) -> None:
    """Adds an adapter whose factors look trained: `B` is not zero, magnitudes differ."""
    bank.add(task, rank, 1.0, logit, generator(task, "A"))
    stream = generator(task, "B")
    with torch.no_grad():
        bank.new_B.copy_(torch.randn(bank.new_B.shape, generator=stream, dtype=torch.float64) * 0.3)
        bank.alpha[-1] *= 0.5 + torch.rand(bank.alpha[-1].shape, generator=stream, dtype=torch.float64)


def filled_bank(vit: nn.Module, count: int = 3, **options: Any) -> AdapterBank:
    """A bank with `count` adapters of unequal logits and ranks, the last of them current."""
    bank = bank_on(vit, **options)
    for task in range(count):
        if bank.current is not None:
            bank.commit()
        trained(bank, task, logit=0.2 * (task % 3) - 0.05 * task, rank=3 + task % 2)
    return bank


def loop_network(vit: VisionTransformer, bank: AdapterBank, beta: Tensor,
                 layers: Callable[[AdapterBank, Tensor], list[nn.Module]] = loop_layers) -> VisionTransformer:
    """A copy of the injected `vit` that computes with a loop over adapters; gradients reach the bank's parameters."""
    plain = tiny_vit(dtype=next(vit.parameters()).dtype)
    plain.load_state_dict({name.replace("qkv.merged", ""): value for name, value in vit.state_dict().items()})
    for block, layer in zip(plain.blocks, layers(bank, beta), strict=True):
        block.attn.qkv = layer
    return plain


# ---- records of runs (`results.json`): a true one from a tiny run, and variations of it

IMAGES = 100  # of every task's test set


def true_record(folder: Path) -> dict[str, Any]:
    """The record of a gated run on two tasks of the digits, trained for the purpose."""
    return run(small_config(folder, nb_tasks=2, eval_every=0))[0]


def varied(base: dict[str, Any], seed: int = 1993, right: Sequence[Sequence[int]] | None = None, *, tasks: int = 3,
           last: int = 60, adapters: Sequence[int] | None = None, parameters: int = 1000, seconds: float = 2.0,
           kept_set: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """`base` as if the run had `tasks` tasks of ten classes and had gone otherwise; every metric follows from the counts.

    right: row `t` holds how many of the 100 test images of each task so far are right after task `t`; without it all are
    80 but `last` of each at the end. adapters: kept after each task. parameters: stored at the end.
    """
    right = right or [[80] * (t + 1) for t in range(tasks - 1)] + [[last] * tasks]
    adapters = adapters or list(range(1, len(right) + 1))
    counts = [TaskCounts([IMAGES] * len(row), list(row), list(row), [min(IMAGES, hit + 10) for hit in row], [0] * len(row))
              for row in right]
    result = copy.deepcopy(base)
    result["tasks"] = [
        {**copy.deepcopy(base["tasks"][-1]), "task": task, "classes": 10, "seen_classes": 10 * task + 10,
         "active_adapters": kept, "stored_parameters": parameters, "stored_bytes": 4 * parameters,
         "seconds": seconds, "training_seconds": 0.75 * seconds, "evaluation_seconds": 0.25 * seconds,
         "peak_memory_bytes": 2**20 * (100 + task), "counts": vars(entry)}
        for task, (kept, entry) in enumerate(zip(adapters, counts, strict=True))]
    result["metrics"] = {**summary(counts), **({"kept_set": kept_set} if kept_set else {})}
    result["seed"] = seed
    result["class_order_sha256"] = hashlib.sha256(str(seed).encode()).hexdigest()
    result["config"] = {**result["config"], "seed": [seed], "nb_tasks": None, "init_cls": 10, "increment": 10, **config}
    return result


def save(folder: Path, record: dict[str, Any], committed: bool = False) -> Path:
    """The record in the layout of a run with several seeds, or of the records kept under `docs/results`."""
    seed = record["seed"]
    path = folder / (f"seed_{seed}.json" if committed else f"seed_{seed}/results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed_json(path, committed_form(record) if committed else record, compact=committed)
    return path
