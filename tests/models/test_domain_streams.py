"""Domain-incremental streams: for every method that takes them what a class-incremental stream promises too, and that a class
has one row whatever domain it comes back in.

That a run is resumed within a task to the same bits is in tests/test_interruption.py, that two processes learn what one does
in tests/utils/runs/test_distributed.py.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.compare import compare
from analysis.gates import main as answer
from analysis.records import find_runs
from analysis.report.__main__ import report
from analysis.report.run_data import run_data
from backbone.heads import HEADS
from backbone.heads.proxy import PrototypeHead
from main import main
from models import LEARNERS, BaseLearner, load_network
from models.simplecil import SimpleCIL
from tests.helpers import OF_METHOD, in_batches, learn, learner_of, method_values, pictures, resumed, same, tiny_config
from tests.tiny_backbone import TINY
from trainer import run
from utils.config import Config, config_from_dict
from utils.data_manager import JoinedStream
from utils.errors import UserError
from utils.results.report import final_table
from utils.rng import generator

LENSES = ["negative", "plain", "edges"]
STREAM = {"scenario": "domain", "task_domains": LENSES, "init_cls": 3, "increment": 3, "nb_tasks": 3}
TAKEN = [name for name, kind in LEARNERS.items() if "domain" in kind.scenarios]
REFUSED = [name for name in LEARNERS if name not in TAKEN]


def values_of(name: str, **changes) -> dict:
    """A config of the method with `changes` to `STREAM`."""
    return {**method_values(name), **STREAM, **changes}


def config_of(name: str, folder: Path | str = "./unused/", **changes) -> Config:
    return config_from_dict({**values_of(name, **changes), "filepath": str(folder)})


# ---- what every method promises


@pytest.mark.parametrize("name", TAKEN)
def test_a_method_learns_domain_after_domain(name: str, tmp_path: Path) -> None:
    """One row of the head for a class, accuracy by domain, and a saved network that is the one evaluated."""
    result, = run(config_of(name, tmp_path))
    tasks = result["tasks"]
    assert [(task["classes"], task["seen_classes"]) for task in tasks] == [(3, 3)] * len(tasks)
    images = tasks[-1]["counts"]["images"]
    assert len(images) == 3 and len(set(images)) == 1, "the same test images in every domain"
    assert tasks[-1]["counts"]["within"] == tasks[-1]["counts"]["top1"] and not any(tasks[-1]["counts"]["wrong_task"])
    by_class = tasks[-1]["class_counts"]
    assert sum(by_class["right"]) == sum(tasks[-1]["counts"]["top1"])
    assert [sum(column) for column in zip(*by_class["predicted_task"])] == images
    assert "kept_set" not in result["metrics"], "every domain is new: which of them need an adapter is not known"
    data = learner_of(config_of(name)).data
    stream = getattr(data, "_stream", data)
    network, right = load_network(tmp_path), [0] * 3
    for batch, labels, owners in stream.test_batches(2, 32):
        hits = network(batch).argmax(1) == labels
        for task in range(3):
            right[task] += int(hits[owners[:, 0] == task].sum())
    assert right == tasks[-1]["counts"]["top1"]


@pytest.mark.parametrize("name", TAKEN)
def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name: str) -> None:
    """From one before a returning domain is settled, and from one between two domains."""
    config = config_of(name)
    last = learner_of(config).data.nb_tasks - 1
    learner = learn(learner_of(config), range(last + 1), end_last=False)
    for _ in range(2):
        again = resumed(learner)
        for each in (learner, again):
            each.end_task() if each.task == last else learn(each, range(last, last + 1))
        assert same(learner, again)
        if last == 0:
            return
        learner = learn(learner_of(config), range(last))


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(name)
    assert f"'scenario' is \"domain\" but 'model_name' is \"{name}\", which is made for \"class\" alone" in str(caught.value)
    assert "\n" not in str(caught.value)
    config_from_dict(method_values(name))


def test_some_are_taken_and_some_are_not() -> None:
    assert {"sdlora", "litelora", "l2p", "ranpac", "aper", "ease", "simplecil", "finetune_head", "joint"} == set(TAKEN)
    assert {"slca", "inflora"} <= set(REFUSED)


def test_a_method_that_says_nothing_takes_new_classes_alone() -> None:
    """Also one that is built on a method which takes more."""
    class Heir(SimpleCIL):
        """Says nothing."""

    assert BaseLearner.scenarios == Heir.scenarios == ("class",) and SimpleCIL.scenarios == ("class", "domain")


# ---- the stream


def test_a_domain_shows_the_same_drawings_through_its_lens() -> None:
    data = learner_of(config_of("finetune_head")).data
    shown = [torch.cat([images for images, _ in data.eval_batches("test", data.task_cells(task), 64)]) for task in range(2)]
    torch.testing.assert_close(shown[0], 1 - shown[1], atol=0.02, rtol=0)
    labels = [torch.cat([labels for _, labels in data.eval_batches("test", data.task_cells(task), 64)]) for task in range(3)]
    assert torch.equal(labels[0], labels[1]) and labels[0].unique().tolist() == [0, 1, 2]
    trained, _ = next(data.train_batches(1, 0, 16))
    assert trained.shape == (16, 3, 16, 16) and data.train_size(0) == data.train_size(2)


def test_an_image_looks_as_in_a_class_incremental_stream() -> None:
    classes = learner_of(config_of("finetune_head", scenario="class")).data
    domains = learner_of(config_of("finetune_head")).data
    for (mine, _), (theirs, _) in zip(classes.eval_batches("train", classes.task_cells(0), 64),
                                      domains.eval_batches("train", domains.task_cells(0), 64), strict=True):
        assert torch.equal(mine, theirs)


def test_held_out_images_are_other_ones_in_every_domain() -> None:
    learner = learner_of(config_of("sdlora", growth_rule="val_loss", val_fraction=0.3))
    first, second = ([images - images.min() for images in learner.data._members["val"][cells.start:cells.stop]]
                     for cells in (learner.data.task_cells(0), learner.data.task_cells(1)))
    assert [len(images) for images in first] == [len(images) for images in second]
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second))


def test_joint_training_sees_all_domains_at_once() -> None:
    learner = learner_of(config_of("joint"))
    data = learner.data
    assert isinstance(data, JoinedStream) and data.nb_tasks == 1 and data.seen_classes(0) == 3 and data.tasks_learned(0) == 3
    assert data.train_size(0) == 3 * data._stream.train_size(0)
    _, labels = zip(*data.train_batches(0, 0, 64), strict=True)
    assert torch.cat(labels).bincount().tolist() == [3 * len(images) for images in data._members["train"][:3]]


@pytest.mark.parametrize("changes, words", [
    ({"increment": 2}, "'increment' is 2 but 'scenario' is \"domain\", in which every task has the 3 classes of 'init_cls'"),
    ({"dataset": ["digits", "glyphs"], "task_domains": None}, "'scenario' is \"domain\" but 'dataset' names several sets"),
    ({"inference": "routed", "route_classes": True}, "'route_classes' is true but 'scenario' is \"domain\""),
    ({"scenario": "domains"}, "'scenario' is \"domains\"; it must be one of \"class\", \"domain\""),
])
def test_what_cannot_be_together_is_one_sentence(changes: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of("sdlora", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- the heads


def features_of(domain: int, images: int = 40, width: int = 8) -> tuple[Tensor, Tensor]:
    """Features of three classes in a domain, float64."""
    draw = generator(domain, "features")
    centres = torch.randn(3, width, generator=generator(0, "centres"), dtype=torch.float64)
    labels = torch.arange(images + 7 * domain) % 3
    return centres[labels] + domain + torch.randn(len(labels), width, generator=draw, dtype=torch.float64) / 2, labels


def fed(kind: type, tasks: list[tuple[Tensor, Tensor]], **changes):
    """A head in float64 that has learned the same three classes in each of these tasks, without training."""
    head = kind(8, tiny_config(**changes), 0).double()
    for task, each in enumerate(tasks):
        head.begin(range(3), (task, len(tasks)), generator(task, "rows"))
        head.commit()
        head.absorb(head.collect(in_batches(*each), 3), task, lambda *_: None)
    return head


@pytest.mark.parametrize("name", HEADS)
def test_a_row_goes_on_from_where_it_was(name: str) -> None:
    keys = {"ridge_dim": 16} if name == "ridge" else {}
    head = HEADS[name](8, tiny_config(model_name="finetune_head", head=name, **keys), 0)
    features = features_of(0)[0].float()
    for task in range(2):
        before = head.rows()
        head.begin(range(3), (task, 2), generator(task, "rows"))
        if task:
            torch.testing.assert_close(head.rows()[0], before[0])
            seen = F.normalize(features) if head.kind == "cosine" else features
            torch.testing.assert_close(head.current_logits(features), F.linear(seen, *before))
        with torch.no_grad():
            head.new_weight.add_(torch.randn(3, 8, generator=generator(task, "step")))
        trained = head.rows()[0].clone()
        head.commit()
        assert torch.equal(head.weight, trained) and head.weight.shape == (3, 8) and head.bias.shape == (3,)


def test_ridge_adds_up_the_sums_of_all_domains() -> None:
    """Two domains one after the other give what all images at once give."""
    (f, y), (g, z) = features_of(0), features_of(1)
    keys = {"model_name": "finetune_head", "head": "ridge", "ridge_dim": 24, "ridge_lambda": 0.1}
    parts = fed(HEADS["ridge"], [(f, y), (g, z)], **keys)
    whole = fed(HEADS["ridge"], [(torch.cat([f, g]), torch.cat([y, z]))], **keys)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.cross, whole.cross)
    torch.testing.assert_close(parts(f), whole(f))
    assert parts.cross.shape[1] == 3


def test_class_means_are_of_the_images_of_all_domains() -> None:
    (f, y), (g, z) = features_of(0), features_of(1)
    head = fed(PrototypeHead, [(f, y), (g, z)])
    both, labels = torch.cat([f, g]), torch.cat([y, z])
    torch.testing.assert_close(head.prototypes, torch.stack([both[labels == label].mean(0) for label in range(3)]))
    assert head.images.tolist() == labels.bincount().tolist()
    assert len(fed(PrototypeHead, [(f, y)]).images) == 0, "nothing is stored for classes that never come back"


def test_simplecil_has_the_means_of_all_domains() -> None:
    learner = learn(learner_of(config_of("simplecil")), range(3))
    sums = torch.zeros(3, 32)
    for images, labels in learner.data.eval_batches("train", range(9), 64):
        sums.index_add_(0, labels, learner.embed(images))
    torch.testing.assert_close(learner.prototypes.weight, F.normalize(sums), rtol=1e-4, atol=1e-5)


def test_the_aligned_head_draws_a_class_from_all_of_its_domains() -> None:
    tasks = [features_of(domain) for domain in range(2)]
    head = fed(HEADS["aligned"], tasks, model_name="finetune_head", head="aligned", align_epochs=1, align_samples=2000)
    assert head.means.shape == (6, 8) and head.weight.shape == (3, 8)
    drawn, labels = head.draw([head.factor(number) for number in range(6)], 2000, generator(1, "draw"))
    for label in range(3):
        mean = torch.stack([f[y == label].mean(0) for f, y in tasks]).mean(0)
        torch.testing.assert_close(drawn[labels == label].mean(0), mean, atol=0.1, rtol=0)


@pytest.mark.parametrize("head", ["cosine", "aligned", "ridge"])
def test_other_heads_run_with_a_gate(head: str, tmp_path: Path) -> None:
    keys = {"ridge": {"ridge_dim": 32}, "aligned": {"align_epochs": 1, "align_samples": 16}}.get(head, {})
    result, = run(config_of("sdlora", tmp_path, head=head, nb_tasks=2, **keys))
    assert load_network(tmp_path)(torch.rand(2, 3, 16, 16)).shape == (2, 3) and result["finished"]


def test_ease_takes_the_likeliest_of_a_class_s_domains() -> None:
    learner = learn(learner_of(config_of("ease", nb_tasks=2, **OF_METHOD.get("ease", {}))), range(2))
    images = next(iter(learner.data.test_batches(1, 16)))[0]
    logits = learner.predict(images)
    learner.head.classes = None
    assert torch.equal(logits, learner.predict(images).view(len(images), 2, 3).amax(1)) and logits.shape[1] == 3


# ---- gates, and what reads a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A routed gate and SD-LoRA on the same domains, with their pictures."""
    folder = tmp_path_factory.mktemp("domains")
    with pictures():
        run(config_of("sdlora", folder / "routed", inference="routed", growth_threshold=0.0))
        run(config_of("sdlora", folder / "sdlora", gate="none", row_fit="alike", gate_lr=None))
    return folder


def test_every_domain_can_found_a_key_with_rows_in_common(runs: Path) -> None:
    gates = torch.load(runs / "routed" / "beta_values_task_2.pt")
    assert gates["route"].tolist() == [0, 1, 2] and gates["pruning_mask"].tolist() == [1, 1, 1]
    assert {path.name for path in (runs / "routed").glob("*.png")} == {"accuracy.png", "gates.png", "growth.png"}
    table = final_table(json.loads((runs / "routed" / "results.json").read_text())).splitlines()
    assert table[0].split()[:5] == ["task", "seen", "T0", "T1", "T2"] and table[-1].split()[:2] == ["2", "3"]


def test_two_methods_are_compared_on_the_page_and_in_the_tables(runs: Path, tmp_path: Path) -> None:
    text, written = compare([runs], tmp_path / "tables")
    assert "digits, 3 domains of 3 classes, domains negative plain edges" in text and len(written) > 2
    assert answer([str(runs / "routed")]) == 0, "pictures and answers on the gate, from the saved networks"


def test_the_page_of_a_report_counts_a_class_once(runs: Path, tmp_path: Path) -> None:
    found, = find_runs([runs / "sdlora"]).runs
    data = run_data(found, "sdlora", 0, LENSES, tmp_path)
    assert data["task_of_class"] == [0, 0, 0] and len(data["class_names"]) == 3 and data["seen"] == [3, 3, 3]
    for package in ("jinja2", "vl_convert"):
        pytest.importorskip(package)
    report([runs], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_class_incremental_run_of_as_many_classes_is_another_stream(runs: Path, tmp_path: Path) -> None:
    run(config_of("sdlora", tmp_path / "class", gate="none", scenario="class", gate_lr=None, init_cls=3, nb_tasks=1))
    text, _ = compare([runs, tmp_path / "class"], tmp_path / "tables")
    assert "3 domains of 3 classes" in text and "1 task of 3 classes" in text


def test_a_dry_run_says_the_split(tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values_of("sdlora"), **TINY, "filepath": str(tmp_path / "run")}))
    assert main(["--config", str(path), "--dry-run"]) == 0
    split = json.loads(capsys.readouterr().out)["split"]
    assert split["task_sizes"] == [3, 3, 3] and len(set(split["train_images"])) == 1 and not (tmp_path / "run").exists()
