"""Small learners on the digits for tests: one thread, one epoch, a few tasks."""

from pathlib import Path
from typing import Any

import torch

from backbone.embedded import EMBEDDED
from models import LEARNERS, BaseLearner
from models.base import Session
from trainer import Quiet, build
from utils.config import Config, config_from_dict

SMALL = {"dataset": "digits", "init_cls": 2, "increment": 2, "nb_tasks": 3, "backbone_type": EMBEDDED, "init_epoch": 1,
         "epochs": 1, "batch_size": 32, "init_lr": 0.01, "lrate": 0.01, "gate_lr": 0.2, "rank": 4, "device": "cpu"}


def small_config(folder: Path | str = "./unused/", **changes: Any) -> Config:
    """A config that trains in seconds."""
    return config_from_dict({**SMALL, "filepath": str(folder), **changes})


def learner_of(config: Config, session: Session | None = None) -> BaseLearner:
    """The config's learner on its data, before the first task; without a `session` nobody evaluates or interrupts it."""
    backbone, data = build(config, config.seed[0], torch.device("cpu"))
    kind = LEARNERS[config.model_name]
    return kind(config, kind.stream(data), backbone, config.seed[0], session or Quiet())


def learn(learner: BaseLearner, tasks: range, end_last: bool = True) -> None:
    """Takes the learner through `tasks`; without `end_last` the last one stays undecided."""
    for task in tasks:
        learner.begin_task(task)
        learner.train()
        if end_last or task + 1 < tasks.stop:
            learner.end_task()


def test_images(learner: BaseLearner, count: int = 32) -> torch.Tensor:
    """The first test images of the stream's first classes."""
    return next(iter(learner.data.eval_batches("test", learner.data.task_classes(0), count)))[0]


test_images.__test__ = False


def in_float64(learner: BaseLearner) -> None:
    """Turns network and adapters to double precision, to compare outputs closely."""
    learner.backbone.double()
    for module in learner.modules():
        module.double()
