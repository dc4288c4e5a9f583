"""analysis/export*.py: what is written gives the run's logits with the packages of its format alone, or one sentence says why
not."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import trainer
from analysis import export_formats
from analysis.export import NAMES, export, main
from analysis.export_formats import FORMATS, Source, fused_lora
from backbone.embedded import EMBEDDED, with_timm_alone
from backbone.heads import HEADS
from models import SavedNetwork, load_network
from models.artifacts import SavedRun
from tests.helpers import filled_bank, small_config, tiny_vit
from utils.data import load_dataset
from utils.errors import UserError
from utils.rng import generator

ROUTED = {"gate_prior": "shift", "inference": "routed", "gate_price": 0.01}  # every task founds a key


def run_of(folder: Path, **changes: Any) -> Path:
    trainer.run(small_config(folder, nb_tasks=2, **changes))
    return folder


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Path:
    """One network with two adapters."""
    return run_of(tmp_path_factory.mktemp("gated") / "run", growth_rule="none", eval_every=0)


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """Two keys after task 1, one after task 0."""
    return run_of(tmp_path_factory.mktemp("routed") / "run", eval_every=0, **ROUTED)


@pytest.fixture(scope="module")
def means(tmp_path_factory) -> Path:
    """No adapters, and a cosine head."""
    return run_of(tmp_path_factory.mktemp("means") / "run", model_name="simplecil")


def digits(count: int = 7) -> Tensor:
    """Test images of the data set, of all classes."""
    images = load_dataset("digits", ".").test.images
    return images[torch.arange(count) * 37 % len(images)] / 255


def loaded(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits by the code of the folder's card."""
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    names: dict[str, Any] = {"images": images}
    with torch.no_grad():
        exec(code, names)
    return torch.as_tensor(names["logits"])


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        export(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- timm


def test_timm_loads_the_checkpoint_in_each_of_its_ways(gated: Path, tmp_path: Path, monkeypatch) -> None:
    out, images = tmp_path / "out", digits()
    said = export(gated, out, "timm")
    assert "after task 1, 4 classes, as timm" in said
    expected = load_network(gated, 1)(images)
    assert torch.allclose(loaded(out, images, monkeypatch), expected, atol=1e-5)
    name, arguments = with_timm_alone(EMBEDDED)
    model = timm.create_model(name, num_classes=4, **arguments)
    timm.models.load_checkpoint(model, str(out / "model.safetensors"))
    whole = timm.create_model(f"local-dir:{out}", pretrained=True)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), expected, atol=1e-5)
        assert torch.allclose(whole.eval()(images), expected, atol=1e-5)
    found = timm.data.resolve_model_data_config(whole)
    assert found["crop_mode"] == "squash" and tuple(found["mean"]) == (0.0, 0.0, 0.0) and found["input_size"] == (3, 32, 32)
    assert whole.pretrained_cfg["label_names"] == SavedRun(gated, 1).class_names()
    assert "license" not in json.loads((out / "config.json").read_text())["pretrained_cfg"]  # of weights that are not these


@pytest.mark.slow
def test_timm_alone_gives_the_logits(gated: Path, tmp_path: Path) -> None:
    """In a process that starts in another folder and sees nothing of this repository."""
    out, images = tmp_path / "out", digits()
    assert main([str(gated), str(out), "--to", "timm"]) == 0
    np.save(tmp_path / "images.npy", images.numpy())
    code = re.search(r"```python\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL).group(1)
    ours = "[name for name in sys.modules if name.split('.')[0] in ('backbone', 'models', 'utils', 'analysis')]"
    program = (f"import sys, numpy, torch\nimages = torch.from_numpy(numpy.load('../images.npy'))\n{code}\n"
               f"numpy.save('../logits.npy', logits.detach().numpy())\nassert not {ours}")
    subprocess.run([sys.executable, "-I", "-c", program], cwd=out, check=True, timeout=300)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert torch.allclose(found, load_network(gated, 1)(images), atol=1e-5)


def test_an_earlier_task_and_a_routed_run_of_one_key_are_single_networks(gated: Path, routed: Path, tmp_path: Path,
                                                                         monkeypatch) -> None:
    for number, run in enumerate((gated, routed)):
        out = tmp_path / str(number)
        assert "after task 0, 2 classes" in export(run, out, "timm", 0)
        assert torch.allclose(loaded(out, digits(), monkeypatch), load_network(run, 0)(digits()), atol=1e-5)


# ---- heads


def with_head(run: Path, kind: str) -> Source:
    """The network of a run as if it had learned with the head `kind`."""
    network, draw = load_network(run, 1), generator(0, kind)
    head = HEADS[kind](network.backbone.width, HEADS[kind].Keys(), 0)
    tensors = {"weight": torch.randn(4, 128, generator=draw), "bias": torch.randn(4, generator=draw)}
    if kind == "ridge":
        tensors = {"weight": torch.randn(4, 50, generator=draw), "projection": torch.randn(128, 50, generator=draw)}
    head.from_file(tensors)
    network.head = head
    return Source(SavedRun(run, 1), network)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_what_it_says_it_is(kind: str, gated: Path, tmp_path: Path) -> None:
    """As code on the tensors of its file, as a linear layer where it is one, and in a graph."""
    source, features, images = with_head(gated, kind), torch.randn(3, 128, generator=generator(1, "features")), digits()
    head = source.network.head
    assert torch.allclose(eval(head.predicts, {"F": F, "features": features, **head.to_file()}), head(features), atol=1e-5)
    if head.as_linear() is None:
        with pytest.raises(UserError, match=f"'{kind}' head; export it as torchscript or onnx"):
            FORMATS["timm"](source, tmp_path)
    else:
        assert torch.allclose(F.linear(features, *head.as_linear()), head(features), atol=1e-5)
        assert FORMATS["timm"](source, tmp_path).difference < 1e-5
    FORMATS["torchscript"](source, tmp_path)
    assert torch.allclose(torch.jit.load(str(tmp_path / "model.pt"))(images), source.network(images), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "model.pt").stat().st_size < 7e6  # nothing that is for learning alone


# ---- graphs


def matches_everywhere(network: SavedNetwork, graph: Any, close: float) -> set[int]:
    """Compares logits at several numbers of images; returns the keys that these met."""
    met = set()
    for count in (1, 2, 70):
        images = digits(count)
        found, expected = torch.as_tensor(graph(images)), network(images)
        assert found.shape == expected.shape
        assert torch.equal(found.isinf(), expected.isinf())
        assert torch.allclose(found, expected, atol=close, rtol=close)
        met |= set(getattr(network, "keys", torch.zeros(0)).tolist())
    return met


@pytest.mark.parametrize("route_classes", [False, True])
def test_torchscript_routes_as_the_run_does(route_classes: bool, routed: Path, tmp_path: Path) -> None:
    network = load_network(routed, 1)
    network.route_classes = route_classes
    FORMATS["torchscript"](Source(SavedRun(routed, 1), network), tmp_path)
    graph = torch.jit.load(str(tmp_path / "model.pt"))
    assert matches_everywhere(network, graph, 1e-5) == {0, 1}
    assert bool(graph(digits(2)).isinf().any()) == route_classes


def test_torchscript_of_one_network_holds_its_weights_once(gated: Path, tmp_path: Path, monkeypatch) -> None:
    export(gated, tmp_path / "out", "torchscript")
    graph = torch.jit.load(str(tmp_path / "out" / "model.pt"))
    assert matches_everywhere(load_network(gated, 1), graph, 1e-5) == set()
    assert sum(tensor.numel() for tensor in graph.state_dict().values()) == 1216896 + 4 * 129
    assert torch.allclose(loaded(tmp_path / "out", digits(), monkeypatch), load_network(gated, 1)(digits()), atol=1e-5)


@pytest.mark.slow
def test_onnx_gives_the_logits_for_any_number_of_images(gated: Path, routed: Path, tmp_path: Path, monkeypatch) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    for run, keys in ((gated, set()), (routed, {0, 1})):
        out = tmp_path / run.parent.name
        export(run, out, "onnx")
        session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
        network = load_network(run, 1)

        def graph(images: Tensor, session: Any = session) -> np.ndarray:
            return session.run(None, {"images": images.numpy()})[0]

        assert matches_everywhere(network, graph, 1e-4) == keys
        assert torch.allclose(loaded(out, digits(), monkeypatch), network(digits()), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"pool_size": 4, "top_k": 2, "model_name": "l2p"}, {"model_name": "dualprompt"},
                                     {"model_name": "codaprompt"}, {"model_name": "litelora"},
                                     {"model_name": "inflora"},
                                     {"model_name": "joint"}, {"model_name": "finetune_head"}, {"gate": "none"}],
                         ids=lambda changes: next(reversed(changes.values())))
def test_every_method_as_far_as_a_format_expresses_it(changes: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    run = run_of(tmp_path / "run", **changes)
    network, images = load_network(run), digits()
    export(run, tmp_path / "script", "torchscript")
    assert torch.allclose(loaded(tmp_path / "script", images, monkeypatch), network(images), atol=1e-5)
    if (name := changes.get("model_name")) in ("l2p", "dualprompt", "codaprompt"):
        for other in ("timm", "peft"):
            assert f"'{name}' puts prompts" in refused(run, tmp_path / other, other)
        if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
            export(run, tmp_path / "onnx", "onnx")
            assert torch.allclose(loaded(tmp_path / "onnx", images, monkeypatch), network(images), atol=1e-4)
        return
    export(run, tmp_path / "timm", "timm")
    assert torch.allclose(loaded(tmp_path / "timm", images, monkeypatch), network(images), atol=1e-5)
    if network.bank is not None and importlib.util.find_spec("peft"):
        export(run, tmp_path / "peft", "peft")
        assert torch.allclose(loaded(tmp_path / "peft", images, monkeypatch), network(images), atol=1e-5)


# ---- peft


def test_a_lora_on_the_fused_qkv_leaves_k_alone() -> None:
    bank = filled_bank(tiny_vit())
    bank.commit()
    for number, task in enumerate(bank.tasks):
        direction, magnitude = bank.direction(task), bank.magnitudes()[number].detach()
        tensors = fused_lora(direction, magnitude)
        for block in range(bank.depth):
            place = f"base_model.model.blocks.{block}.attn.qkv"
            q, k, v = (tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"]).chunk(3)
            for p, (name, found) in enumerate((("q", q), ("v", v))):
                A, B = direction[f"blocks.{block}.{name}.A"], direction[f"blocks.{block}.{name}.B"]
                assert torch.allclose(found, magnitude[block, p] * B @ A)
            assert not k.any()
            assert len(tensors[f"{place}.lora_A.weight"]) == 2 * bank.ranks[number]


def test_peft_files_are_complete_without_peft(gated: Path, tmp_path: Path) -> None:
    export(gated, tmp_path / "out", "peft")
    for task in (0, 1):
        config = json.loads((tmp_path / "out" / f"adapter_{task}" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 8 and config["target_modules"] == ["attn.qkv"]
        assert len(load_file(tmp_path / "out" / f"adapter_{task}" / "adapter_model.safetensors")) == 12
    assert load_file(tmp_path / "out" / "head.safetensors")["weight"].shape == (4, 128)


@pytest.mark.slow
def test_peft_combines_the_adapters_to_the_same_network(gated: Path, tmp_path: Path, monkeypatch) -> None:
    """By the card's code, and once merged into the weights."""
    peft = pytest.importorskip("peft")
    out, network, images = tmp_path / "out", load_network(gated, 1), digits()
    export(gated, out, "peft")
    assert torch.allclose(loaded(out, images, monkeypatch), network(images), atol=1e-5)
    name, arguments = with_timm_alone(EMBEDDED)
    base = timm.create_model(name, num_classes=0, checkpoint_path=str(out / "base.safetensors"), **arguments).eval()
    model = peft.PeftModel.from_pretrained(base, str(out / "adapter_0"), adapter_name="adapter_0")
    model.load_adapter(str(out / "adapter_1"), adapter_name="adapter_1")
    weights = list(network.gate_weights().values())
    model.add_weighted_adapter(["adapter_0", "adapter_1"], weights, "all", combination_type="cat")
    model.set_adapter("all")
    merged, expected = model.merge_and_unload().state_dict(), network.as_timm().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[key], expected[key], atol=1e-5) for key in expected)


# ---- the card


def test_the_card_says_what_the_run_has_measured_and_what_nobody_has_said(gated: Path, tmp_path: Path) -> None:
    arguments = [str(gated), str(tmp_path / "out"), "--to", "torchscript", "--license", "mit"]
    assert main(arguments) == 0
    text, record = (tmp_path / "out" / "README.md").read_text(), SavedRun(gated).result
    assert text.startswith('---\nlicense: "mit"\n') and "| this model | mit |" in text
    assert "| the data, digits | not stated" in text
    assert f"all classes above | {record['metrics']['last_accuracy']:.2f} % |" in text
    assert all(f"| {column} | {name} | {column // 2} |" in text for column, name in enumerate(record["class_names"][:4]))
    assert record["backbone"]["sha256"] in text


# ---- bad input


def test_what_a_format_cannot_express_is_one_sentence(routed: Path, means: Path, tmp_path: Path, capsys) -> None:
    for to in ("timm", "peft"):
        assert "routes every image to one of 2 networks" in refused(routed, tmp_path / "out", to)
    assert "no linear layer gives the logits of this run's 'cosine' head" in refused(means, tmp_path / "out", "timm")
    assert "model_name 'simplecil' has no adapters" in refused(means, tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []
    assert main([str(routed), str(tmp_path / "out"), "--to", "timm"]) == 2
    assert capsys.readouterr().err.startswith("error: inference: ")


def test_a_folder_that_holds_anything_is_left_as_it_is(gated: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    assert "is not empty" in refused(gated, tmp_path, "timm")
    assert "is a file" in refused(gated, tmp_path / "mine", "timm")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine", "x")]
    (tmp_path / "empty").mkdir()
    export(gated, tmp_path / "empty", "timm")
    assert (tmp_path / "empty" / "README.md").is_file()


def test_the_command_line_knows_every_format_and_a_foreign_head_goes_as_a_graph(gated: Path, tmp_path: Path) -> None:
    assert tuple(FORMATS) == NAMES
    network = load_network(gated, 1)
    network.head = torch.nn.Linear(128, 4).requires_grad_(False)
    source = Source(SavedRun(gated, 1), network)
    for to in ("timm", "peft"):
        with pytest.raises(UserError, match="this run's Linear does not say how its tensors predict"):
            FORMATS[to](source, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert FORMATS["torchscript"](source, tmp_path).difference < 1e-5


def test_runs_and_tasks_that_are_not_there_are_named(gated: Path, tmp_path: Path) -> None:
    assert "task 2 has not been finished" in refused(gated, tmp_path / "out", "timm", 2)
    assert "results.json: there is no such file" in refused(tmp_path, tmp_path / "out", "timm")
    (tmp_path / "runs" / "seed_1").mkdir(parents=True)
    (tmp_path / "runs" / "seed_1" / "results.json").write_text("{}")
    assert "seed_1'" in refused(tmp_path / "runs", tmp_path / "out", "timm")
    with pytest.raises(SystemExit) as caught:
        main([str(gated), str(tmp_path / "out"), "--to", "tflite"])
    assert caught.value.code == 2


def test_a_missing_package_is_one_sentence_with_the_command(gated: Path, tmp_path: Path, monkeypatch) -> None:
    find = importlib.util.find_spec  # the others are there, whatever is installed

    def found(name: str, *rest: Any) -> Any:
        return {"onnxscript": None, "onnx": "here", "onnxruntime": "here"}.get(name) if "onnx" in name else find(name, *rest)

    monkeypatch.setattr(export_formats.importlib.util, "find_spec", found)
    said = refused(gated, tmp_path / "out", "onnx")
    assert "needs onnxscript" in said and said.endswith("pip install onnx onnxscript onnxruntime")


def test_what_fails_or_gives_other_logits_leaves_nothing(gated: Path, tmp_path: Path, monkeypatch) -> None:
    def full(source: Source, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "timm", full)
    assert "could not be written (No space left on device)" in refused(gated, tmp_path / "out", "timm")
    monkeypatch.setattr(SavedNetwork, "as_graph", lambda self: torch.nn.Sequential(self.backbone, self.head, torch.nn.Tanh()))
    assert "the logits of what it makes differ from the run's" in refused(gated, tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []
