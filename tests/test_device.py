"""A rehearsal on a device that is not there: tensors on "cuda" that have shapes and no values.

Under FakeTensorMode an operation on tensors of two devices raises, and so does whatever needs a value to go on: on a GPU the
one fails and the other waits for the device. Values may be looked at between the parts of a task, where something is decided
or said, and not from one optimizer step to the next, nor from one batch to the next of any pass over images.

There is no autograd engine for such tensors: backward and update stand still, `GatedLinear.backward` is called by hand.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from backbone.gated_linear import GatedLinear
from backbone.heads import HEADS
from models import LEARNERS, BaseLearner
from models.recipes import GATES
from models.training import Meter
from tests.helpers import OF_METHOD, Watch, grown, learn, learner_of, tiny_config
from utils.results.tally import Tally
from utils.runs.progress import Progress

CUDA = torch.device("cuda")


def _has_fake_devices() -> bool:
    """Whether a tensor without values can move to a device that is not there; torch 2.8 starts CUDA for it."""
    try:
        with FakeTensorMode():
            torch.empty(1).to(CUDA)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _has_fake_devices(), reason="this torch starts CUDA for tensors without values too")
_READ = torch.ops.aten._local_scalar_dense.default
_UNIQUE, _NONZERO, _EMPTY = torch.ops.aten._unique2.default, torch.ops.aten.nonzero.default, torch.ops.aten.new_empty.default
_COPY = torch.ops.aten._to_copy.default
# No pass over images, and what comes of a part decides over it; and a pass over images that may end with every batch.
_DECIDES = ("ridge_lambda", "memory of directions", "looking for what is new")


class Rehearsal(FakeTensorMode):
    """Counts the values that are looked at on the device; each is `answer` if it is a truth, else a small number.

    Nothing can go on whose shape depends on values, but for `routing`: then one key is there, and all images have it. To copy
    a tensor from the device is to look at it.
    """

    def __init__(self, answer: bool) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.answer, self.reads, self.routing = answer, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if self.routing and func in (_UNIQUE, _NONZERO):
            self.reads += args[0].device.type == "cuda"
            if func is _UNIQUE:
                return torch.zeros(1, dtype=torch.long), torch.empty(0), torch.empty(0)
            func, args, kwargs = _EMPTY, (args[0], [len(args[0]), 1]), {"dtype": torch.long}
        if func is _COPY and (kwargs or {}).get("device") == torch.device("cpu"):
            self.reads += args[0].device.type == "cuda"
        if func is not _READ:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.reads += args[0].device.type == "cuda"
        kind = args[0].dtype
        if kind.is_floating_point:
            return 100.0 if self.answer else 0.5
        return {torch.bool: self.answer, torch.int32: 0}.get(kind, 2)  # linear algebra went well; classes of a task


class Delimited(Watch):
    """A session that notes how often the device was read from one step or part of a pass to the next."""

    def __init__(self, mode: Rehearsal) -> None:
        super().__init__()
        self.mode, self.before, self.waits = mode, 0, []

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        again = self.calls and self.calls[-1] == title and (done > 0 or title == "step")
        if again and not any(decides in title for decides in _DECIDES) and self.mode.reads > self.before:
            self.waits.append(title)
        self.calls.append(title)
        self.before = self.mode.reads

    def track(self, figures: dict[str, float]) -> None:
        """An epoch has ended, and its figures have been read."""
        self.before = self.mode.reads

    def evaluate(self) -> float:
        evaluated(self.learner)
        return 0.0


def evaluated(learner: BaseLearner, waits: int = 0) -> None:
    """As the trainer evaluates: one read at the end, and so many `waits` in every batch."""
    data = learner.data
    task = data.tasks_learned(learner.task) - 1  # joint training has learned all, in its one
    tally = Tally(data.tasks.seen[task], task + 1, CUDA)
    learner.start_evaluation()
    before = learner.session.mode.reads
    for images, labels, owners in data.test_batches(task, 150):
        tally.add(learner.predict(images), labels, owners)
        before += waits
    assert learner.session.mode.reads == before


def moved(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def on_cuda(learner: BaseLearner) -> BaseLearner:
    """The learner as it would be on a GPU; called under a Rehearsal."""
    recipe = getattr(learner, "recipe", None)
    parts = [part for part in vars(recipe or learner).values() if isinstance(part, nn.Module)]
    for module in [learner.backbone, *learner.modules(), *parts]:
        for part in module.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(moved(tensor), tensor.requires_grad)
            part._buffers.update({name: moved(tensor) for name, tensor in part._buffers.items() if tensor is not None})
    for source in learner.data._sources.values():
        source.images, source.device = moved(source.images), CUDA
    learner.device = learner.data.device = CUDA
    owner = recipe or learner
    owner.load_state(owner.state())  # what it keeps besides modules goes where the learner is
    learner.data._mean_std = learner.data._mean_std and [moved(part) for part in learner.data._mean_std]
    return learner


def hold_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward gives every leaf of the graph a gradient, no optimizer moves anything, and no figures are shown: on a busy
    machine that would be due between any two steps. Rows that are drawn until all are within bounds stay as they are: without
    values they would be drawn for ever."""

    def backward(tensor: Tensor, gradient: Tensor | None = None, retain_graph: bool = False) -> None:
        assert tensor.requires_grad and tensor.device.type == "cuda"
        nodes, seen = [tensor.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)
            nodes += [following for following, _ in node.next_functions]

    monkeypatch.setattr(Tensor, "backward", backward)
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(kind, "step", lambda optimizer: None)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(Meter, "first_bad", lambda meter: None)
    monkeypatch.setattr(Progress, "LINE_SECONDS", math.inf)


_HEADS = {"linear": {}, "cosine": {}, "aligned": {"align_epochs": 2, "align_samples": 8}, "ridge": {"ridge_dim": 16}}
# Routed inference asks in every batch which networks its images need; it is evaluated at the end.
_CASES = [{"gate": gate} for gate in GATES] + [{"inference": "routed", "eval_every": 0}] + [
    {"head": head, **_HEADS[head], **method} for head in HEADS for method in ({}, {"model_name": "finetune_head"})] + [
    {"model_name": name, **OF_METHOD.get(name, {})} for name in LEARNERS] + [
    {"growth_rule": "val_loss", "val_fraction": 0.2}, {"growth_rule": "topk"}, {"gate": "none", "growth_rule": "kd"},
    {"grad_accum": 3}, {"precision": "bf16"}, {"normalize": "backbone"}]
# How often a batch of a settled network waits, where it is looked up which of several networks its images are to meet: once,
# and once in every round until nothing changes.
_LOOK_UPS = {"routed": 1, "mos": 2}


@pytest.mark.parametrize("changes, answer", [
    pytest.param(changes, answer, id=",".join(map(str, [*changes.values(), "kept" if answer else "dropped"])),
                 marks=[] if answer and {"gate", "model_name"} & changes.keys() else [pytest.mark.slow])
    for changes in _CASES for answer in ([True, False] if {"gate", "growth_rule", "inference"} & changes.keys() else [True])])
def test_a_task_on_a_device_that_is_not_there(changes: dict, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(tiny_config(batch_size=150, **changes))
    task = min(1, learner.data.nb_tasks - 1)  # joint training has a single one
    if task:
        (grown if hasattr(learner, "recipe") else learn)(learner, range(task))
    orders = [learner.data._shuffled(task, epoch) for epoch in range(4)]
    monkeypatch.setattr(learner.data, "_shuffled", lambda task, epoch: orders[epoch % 4])  # drawn on the host, with values
    hold_still(monkeypatch)
    with Rehearsal(answer) as mode:
        session = learner.session = Delimited(mode)
        session.learner = on_cuda(learner)
        learn(learner, range(task, task + 1))
        decided = ["step"] if "inference" in changes else []  # the routed gate decides once, between two steps
        assert session.calls and session.waits in ([], decided)
        looked_up = max((_LOOK_UPS.get(value, 0) for value in changes.values() if isinstance(value, str)), default=0)
        mode.routing = looked_up > 0
        evaluated(learner, waits=looked_up)


def test_gradients_of_the_projection_stay_on_the_device() -> None:
    with Rehearsal(True) as mode:
        for stored in (2, 9):
            sizes = [(2, stored), (2, stored, 8), (2, 8, stored), (2,), (2, 3, 8), (2, 8, 3)]
            tensors = [torch.empty(size, device=CUDA) for size in [(4, 5, 8), (24, 8), *sizes]]
            for trained in (True, False):
                needs = (True, False, False, trained, False, False, True, True, True)
                context = SimpleNamespace(saved_tensors=tensors, needs_input_grad=needs)
                found = GatedLinear.backward(context, torch.empty(4, 5, 24, device=CUDA))
                assert all(gradient.device.type == "cuda" for gradient in found if gradient is not None)
        assert mode.reads == 0


def test_the_rehearsal_sees_what_it_looks_for() -> None:
    with Rehearsal(True) as mode:
        there = torch.empty(3, device=CUDA)
        with pytest.raises(RuntimeError, match="two.* devices"):  # the error of torch 2.8 has no class of its own
            there + torch.empty(3)
        with pytest.raises(DynamicOutputShapeException):
            there[there > 0]
        there.tolist()
        bool(there.sum() > 0)
        there.cpu()
        assert mode.reads == 5
