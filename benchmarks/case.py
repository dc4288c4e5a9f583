"""One case of `benchmarks.step`, measured in this process and printed as one line of JSON.

`python -m benchmarks.case '<settings as JSON>'`; the cases are:

- `step`: the project's own training step with `adapters` old adapters: learner, adapter bank, gate, head, meter and fused
  optimizer as `main.py` makes them, on one batch that is given again and again (reading and augmenting it is
  `benchmarks.run`'s business); then the evaluation of an image, likewise.
  With a `model_name` it is that method, which has learned `adapters` tasks before, for as short as can be, and the image is
  evaluated once the task is settled. A method that makes no steps in such a task has no seconds per step. How many forwards
  both take is counted.
- `loop`, `stacked`: the same step, the projection replaced by one of `benchmarks/references.py`.
- `floor`: the plain timm ViT's forward and backward with nothing to train but its input; then its plain forward.
- `backbone`: the same of the project's frozen ViT, whose last block may be shorter (`backbone/class_token.py`).

On the CPU, whose speed wanders on most machines, a step of the floor is taken between any two steps of the other kinds, and
the median quotient of neighbours is reported beside the seconds; the evaluation of an image likewise. Not in the loop, which
needs the memory for itself.

Peak memory: on CUDA `max_memory_allocated` of the process. On the CPU the largest resident size of the process minus what it
had been before the backbone was built, so that Python and its libraries are not counted and everything else is: weights,
adapters, activations, gradients, and what the allocator keeps. It is taken after the first steps (`warmup`), before there is a
floor in the process, and before evaluation.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbone import create_backbone
from backbone.routing import Moments
from backbone.vit import data_config, load_vit
from benchmarks.common import GENERATED, Clock, generated_dataset, register
from benchmarks.references import loop_layers, stacked_layers
from models import LEARNERS, BaseLearner
from models.sdlora import SDLoRA
from trainer import Quiet, build
from utils.config import Config, command_line_changes, config_from_dict
from utils.config.components import chosen, config_class
from utils.rng import generator
from utils.runs.runtime import peak_memory, pick_device

CLASSES = 10  # of the current task
REFERENCES = {"loop": loop_layers, "stacked": stacked_layers}


class Case(NamedTuple):
    """What is measured. kind: "step", "loop", "stacked", "floor" or "backbone"; adapters: old ones, beside the current one.

    model_name: a method in place of the named one with adapters that nobody has trained; overrides: `KEY=VALUE` of its config.
    """

    kind: str
    adapters: int
    precision: str
    backbone: str
    batch: int
    rank: int
    gate: str
    inference: str
    device: str
    compile: bool
    steps: int
    warmup: int
    model_name: str | None = None
    overrides: Sequence[str] = ()


class Stopwatch(Quiet):
    """Times what happens between its calls. As the session of a learner it asks for nothing and times the optimizer steps.

    After `warmup` calls, which are not counted, `ready` is called once; what it returns, if anything, is run and timed before
    every call to come, as the pace that the machine keeps.
    """

    def __init__(self, device: torch.device, warmup: int,
                 ready: Callable[[], Callable[[], Any] | None] = lambda: None) -> None:
        super().__init__()
        self.clock, self.warmup, self.ready = Clock(device), warmup, ready
        self.calls, self.pace = 0, None
        self.spans: list[tuple[Any, Any]] = []
        self.pace_spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def after_step(self) -> None:
        now = self.clock.mark()
        self.calls += 1
        if self.calls > self.warmup:
            self.spans.append((self._began, now))
        elif self.calls == self.warmup and (pace := self.ready()):
            pace()
            self.pace = pace
        if self.pace:
            first = self.clock.mark()
            self.pace()
            self.pace_spans.append((first, self.clock.mark()))
        self._began = self.clock.mark()

    def median(self) -> float | None:
        """Seconds between two calls; None without any."""
        return statistics.median(self._seconds(self.spans)) if self.spans else None

    def over_pace(self) -> float | None:
        """The median quotient of a span and the run of the pace right before it; None without a pace."""
        if not self.pace:
            return None
        spans, paces = self._seconds(self.spans), self._seconds(self.pace_spans)
        return statistics.median(span / pace for span, pace in zip(spans, paces))

    def _seconds(self, spans: list[tuple[Any, Any]]) -> list[float]:
        return [self.clock.seconds(*span) for span in spans]


class Forwards:
    """Counts how often a learner sends the images of a step, and those that it evaluates, through its network; half of the
    blocks count half.

    found: of the last call of its `backward` and its `predict`.
    """

    def __init__(self, learner: BaseLearner) -> None:
        self.found: dict[str, float] = {}
        self._blocks, self._passed = learner.backbone.vit.blocks, 0
        for block in self._blocks:
            block.register_forward_pre_hook(self._pass)
        for method, name in (("backward", "step_forwards"), ("predict", "image_forwards")):
            if hasattr(learner, method):
                setattr(learner, method, partial(self._counted, name, getattr(learner, method)))

    def _pass(self, block: torch.nn.Module, arguments: tuple) -> None:
        self._passed += len(arguments[0])

    def _counted(self, name: str, call: Callable, images: Tensor, *arguments: Any) -> Any:
        before = self._passed
        result = call(images, *arguments)
        self.found[name] = (self._passed - before) / len(self._blocks) / len(images)
        return result


class Plain:
    """A ViT that nothing is trained in: forward, and backward to its input, on the case's batch in its precision."""

    def __init__(self, case: Case, vit: torch.nn.Module, size: int, device: torch.device) -> None:
        self.case, self.vit = case, vit.to(device)
        self.run = torch.compile(self.vit) if case.compile else self.vit
        self.pixels = _batch(case, size, device)[0].requires_grad_()

    @classmethod
    def floor(cls, case: Case, device: torch.device) -> "Plain":
        """The plain timm ViT."""
        vit, _ = load_vit(case.backbone, pretrained=False, weights=None, seed=0)
        return cls(case, vit, data_config(vit)[0], device)

    def forward(self, compiled: bool = True) -> Tensor:
        """Features of the batch."""
        with torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            return (self.run if compiled else self.vit)(self.pixels)

    def step(self, compiled: bool = True) -> None:
        """Forward and backward."""
        self.forward(compiled).float().square().mean().backward()
        self.pixels.grad = None


def config_of(case: Case) -> Config:
    """The case as a config of the trainer: random weights, all adapters kept, learning rates that move next to nothing.

    Of a `model_name` everything else is at its default. Raises UserError.
    """
    values = {
        "dataset": GENERATED, "init_cls": CLASSES, "increment": CLASSES, "backbone_type": case.backbone, "pretrained": False,
        "device": [case.device], "rank": case.rank, "gate": case.gate, "growth_rule": "none",
        **({"inference": case.inference, "gate_prior": "none"} if case.inference == "routed" else {}),
        "batch_size": case.batch, "precision": case.precision,
        # a reference makes new layers in every step, which would be compiled every time
        "compile": case.compile and case.kind not in REFERENCES, "init_epoch": 1, "epochs": 1,
        "init_lr": 1e-5, "lrate": 1e-5, "eval_every": 0}
    if case.model_name is not None:
        given = {key: value for key, (value, _) in command_line_changes(list(case.overrides)).items()}
        given = {"model_name": case.model_name, **given}
        known = config_class(chosen({**values, **given})).model_fields
        values = {**{key: value for key, value in values.items() if key in known}, **given}
    return config_from_dict(values)


def learner_with(config: Config, adapters: int, device: torch.device) -> SDLoRA:
    """The learner at the start of a task, after `adapters` tasks whose adapters look trained."""
    register(generated_dataset(CLASSES * (adapters + 1), train=1, test=1, size=32))
    backbone, data = build(config, config.seed[0], device)
    learner = SDLoRA(config, data, backbone, config.seed[0], Quiet())
    for task in range(adapters):
        add_trained(learner, task, config.rank)
        found_key(learner, task)
    learner.begin_task(adapters)
    return learner


def learner_after(config: Config, tasks: int, device: torch.device) -> BaseLearner:
    """The config's learner at the start of a task, after `tasks` that it has really learned, a few images of each; those of a
    stream that it learns at once are a single one."""
    register(generated_dataset(CLASSES * (tasks + 1), train=2, test=1, size=32))
    backbone, data = build(config, config.seed[0], device)
    kind = LEARNERS[config.model_name]
    learner = kind(config, kind.stream(data), backbone, config.seed[0], Quiet())
    for task in range(learner.data.nb_tasks - 1):
        learner.begin_task(task)
        learner.train()
        learner.end_task()
    learner.begin_task(learner.data.nb_tasks - 1)
    return learner


@torch.no_grad()
def add_trained(learner: SDLoRA, task: int, rank: int) -> None:
    """One more stored adapter, its B random."""
    bank = learner.bank
    bank.add(task, rank, 1.0, 0.0, generator(learner.seed, "adapter", task))
    drawn = torch.randn(bank.new_B.shape, generator=generator(learner.seed, "B", task)) * 0.01
    bank.new_B.copy_(drawn)
    bank.commit()


@torch.no_grad()
def found_key(learner: SDLoRA, task: int) -> None:
    """If the learner routes: a key for the adapter of `task`, from images of noise, as those are that will be routed."""
    router = getattr(learner.recipe, "router", None)
    if router is None:
        return
    stream, size = generator(learner.seed, "key", task), learner.data.image_size
    images = torch.rand(64, 3, size, size, generator=stream).to(learner.device)
    looks = router.statistics(learner.backbone.early_tokens(images))
    router.found(task, Moments.of(64, looks.sum(0), looks.T @ looks))
    learner.recipe.route.append(task)
    learner.recipe.betas[task] = {task: 1.0}


def use_reference(learner: SDLoRA, layers: Callable[..., list[torch.nn.Module]]) -> None:
    """From here on the learner's steps compute with `layers` in place of the fast projection."""
    bank, vit = learner.bank, learner.backbone.vit

    def train_step(noise: Tensor | None = None) -> Tensor:
        beta = bank.gate(None if noise is None else noise.to(bank.gate.logits))
        for block, layer in zip(vit.blocks, layers(bank, beta), strict=True):
            block.attn.qkv = layer
        return beta

    bank.train_step = train_step


def train_on(learner: BaseLearner, session: Any, images: Tensor, labels: Tensor, steps: int) -> None:
    """`steps` steps of the learner's own training loop on one batch, in the first phase that its task has.

    A method that looks at the task before it trains, under epochs beyond those of training, sees that batch once.
    """
    batch, data = (images, labels), learner.data
    supply = repeat(batch, steps)
    data.train_batches = lambda _, epoch, *__, **___: supply if epoch < learner.epochs() else iter([batch])
    data.images_in_batch = lambda *_: len(images)
    own, learner.session = learner.session, session
    learner.train()
    learner.session = own
    del data.train_batches, data.images_in_batch  # the methods are there again


def measure(case: Case) -> dict[str, Any]:
    """Seconds per step and per evaluated image (medians over the steps), peak memory in bytes; on the CPU, for all but floor
    and loop, also how many times the floor's time both take."""
    device, _ = pick_device([case.device])
    config = config_of(case)
    torch.zeros(1, device=device).sum()
    before = 0 if device.type == "cuda" else peak_memory(device)
    train, predict, more = (_plain if case.kind in ("floor", "backbone") else _learner)(case, config, device)
    paced = device.type == "cpu" and case.kind not in ("floor", "loop")
    peaks: list[int] = []
    floors: list[Plain] = []

    def ready() -> Callable[[], Any] | None:
        # The kernel counts pages in batches of its own: a small network may seem to need less than nothing.
        peaks.append(max(0, peak_memory(device) - before))
        floors.extend([Plain.floor(case, device)] if paced else [])
        return floors[0].step if paced else None

    watch = Stopwatch(device, case.warmup, ready)
    train(watch)
    if not peaks:  # no step was made
        ready()
    result = {**case._asdict(), "step_seconds": watch.median(), "step_over_floor": watch.over_pace(), "peak_bytes": peaks[0]}
    if predict is not None:
        watch = Stopwatch(device, case.warmup, lambda: floors[0].forward if paced else None)
        with torch.no_grad():
            for _ in range(case.warmup + case.steps):
                predict()
                watch.after_step()
        result |= {"image_seconds": watch.median() / case.batch, "image_over_floor": watch.over_pace()}
    return {**result, **more}


def _learner(case: Case, config: Config, device: torch.device) -> tuple[Callable, Callable | None, dict[str, Any]]:
    learner = (learner_after if case.model_name else learner_with)(config, case.adapters, device)
    if case.kind in REFERENCES:
        use_reference(learner, REFERENCES[case.kind])
    images, labels = _batch(case, learner.data.image_size, device)
    labels = labels + learner.data.task_classes(learner.task).start
    counted = case.model_name and not case.compile  # hooks that count would be compiled
    forwards = Forwards(learner).found if counted else {}

    def predict() -> None:
        learner.predict(images)

    def train(watch: Stopwatch) -> None:
        train_on(learner, watch, images, labels, case.warmup + case.steps)
        if case.model_name:
            learner.end_task()
        learner.start_evaluation()

    return train, predict if case.kind == "step" else None, forwards


def _plain(case: Case, config: Config, device: torch.device) -> tuple[Callable, Callable, dict[str, Any]]:
    if case.kind == "floor":
        plain = Plain.floor(case, device)
    else:
        frozen = create_backbone(config)
        frozen.read_class_token_alone()
        plain = Plain(case, frozen, frozen.image_size, device)

    def train(watch: Stopwatch) -> None:
        for _ in range(case.warmup + case.steps):
            plain.step()
            watch.after_step()

    more = {}
    if device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            plain.step(compiled=False)
        more = {"flops": counter.get_total_flops(), "bf16_matmul_flops_per_second": _matmul_rate(device)}
        torch.cuda.reset_peak_memory_stats(device)
    return train, plain.forward, more


def _batch(case: Case, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch, 3, size, size, generator=stream).to(device)
    return images, (torch.arange(case.batch) % CLASSES).to(device)


def _matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Operations per second of a bfloat16 product of two square matrices (median of ten), two per multiply-add."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    watch = Stopwatch(device, warmup=3)
    for _ in range(13):
        torch.mm(left, right)
        watch.after_step()
    return 2 * size**3 / watch.median()


def from_json(text: str) -> Case:
    """The case with these fields; ValueError or TypeError for anything else."""
    return Case(**json.loads(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.case", description="One case of benchmarks.step.")
    parser.add_argument("case", type=from_json, help="the fields of a Case as JSON")
    print(json.dumps(measure(parser.parse_args().case)), flush=True)
