"""The formats that a run's network is exported to: what is written for each, and how it is loaded with that format's own
package alone.

Shapes: b images, d width, r rank of an adapter.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from timm.models._hub import save_for_hf  # which timm.models itself has only of late
from torch import Tensor, nn

from backbone.embedded import with_timm_alone
from backbone.heads.linear import GrowingHead
from models.artifacts import SavedNetwork, SavedRun
from utils.errors import UserError
from utils.rng import generator

CLOSE = {"timm": 1e-5, "torchscript": 1e-5, "onnx": 1e-4}  # of what is loaded again, over the largest logit or 1
_FILE_LIMIT = 1_800_000_000  # bytes of weights that one ONNX file, a protocol buffer, can hold


@dataclass(frozen=True)
class Exported:
    """What was written: how to load it, as Python code run in its folder that ends with `logits` for `images`; the packages
    which that needs; and the largest difference of its logits from the network's, where they were compared."""

    load: str
    packages: tuple[str, ...]
    difference: float | None = None


@dataclass(frozen=True)
class Source:
    """What is exported: the files of a run after a task, and the network from them."""

    saved: SavedRun
    network: SavedNetwork

    @property
    def classes(self) -> int:
        """Columns of the logits."""
        return self.saved.result["tasks"][self.saved.task]["seen_classes"]

    @property
    def head(self) -> GrowingHead:
        """The head; raises UserError for one that only a graph can hold."""
        head = self.network.head
        if not isinstance(head, GrowingHead):
            raise UserError(f"head: this run's {type(head).__name__} does not say how its tensors predict; export it as "
                            "torchscript or onnx.")
        return head

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """The model name and arguments with which timm alone makes the backbone."""
        named, config = self.saved.result["backbone"], self.saved.config
        name, arguments = with_timm_alone(named["name"])
        chosen = {"img_size": config.image_size, "depth": config.backbone_block}
        arguments = {**arguments, **{key: value for key, value in chosen.items() if value is not None}}
        return (f"{name}.{named['tag']}" if named["tag"] else name), arguments

    def images(self, count: int) -> Tensor:
        """Images of noise `[count, 3, S, S]`."""
        size = self.network.backbone.image_size
        return torch.rand(count, 3, size, size, generator=generator(0, "export", count))


# ---- timm


def to_timm(source: Source, folder: Path) -> Exported:
    """`model.safetensors`, and `config.json` with which timm also takes the folder as a whole (`local-dir:`).

    Raises UserError for a network that is no single ViT, and a head that is no linear layer.
    """
    vit, linear, (name, arguments) = source.network.as_timm(), source.head.as_linear(), source.call
    if linear is None:
        raise UserError("head: a timm classifier is a linear layer, and no linear layer gives the logits of this run's "
                        f"'{source.head.kind}' head; export it as torchscript or onnx.")
    model = timm.create_model(name, pretrained=False, num_classes=source.classes, **arguments)
    model.load_state_dict({**model.state_dict(), **vit.state_dict(), **_classifier(model, *linear)})
    _describe(model, source)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    call = _call(name, num_classes=source.classes, checkpoint_path="model.safetensors", **arguments)
    load = f"import timm\n\nmodel = {call}.eval()\nlogits = model(images)"
    again = timm.create_model(name, num_classes=source.classes, checkpoint_path=str(folder / "model.safetensors"), **arguments)
    return Exported(load, ("timm",), _compared("timm", source, again.eval()))


def _classifier(model: nn.Module, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The tensors of the model's classifier; a distilled one has two, whose mean it takes."""
    made = model.get_classifier()
    layers = made if isinstance(made, tuple | list) else [made]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    return {f"{name}.{part}": tensor for name in names for part, tensor in (("weight", weight), ("bias", bias))}


def _describe(model: nn.Module, source: Source) -> None:
    """Writes into the model's own config what timm is to make of images and columns. What the config says of the weights that
    timm has under that name, their licence among it, does not hold for these."""
    view = source.saved.test_view()
    model.pretrained_cfg = {
        **model.pretrained_cfg, "input_size": (3, view.size, view.size), "interpolation": "bicubic",
        "crop_pct": 1.0 if view.test_resize is None else 1 / view.test_resize,
        "crop_mode": "squash" if view.test_resize is None else "center",
        "mean": tuple(view.mean or (0.0,) * 3), "std": tuple(view.std or (1.0,) * 3),
        "num_classes": source.classes, "label_names": source.saved.class_names(), "label_descriptions": None,
        "test_input_size": None, "test_crop_pct": None, "tag": source.saved.result["backbone"]["tag"], "license": None,
        "description": None, "origin_url": None, "paper_name": None, "paper_ids": None, "notes": None}


# ---- peft


def to_peft(source: Source, folder: Path) -> Exported:
    """A LoRA adapter per kept one in `adapter_<task>/`, on timm's fused qkv: of twice the rank, its B zero on the rows of k.

    B carries the magnitudes, so the weights of PEFT's combination are the gate weights. The head goes beside them, and the
    frozen network too where timm cannot download it. Raises UserError for a network that is no single ViT with adapters.
    """
    network, bank = source.network, source.network.bank
    if bank is None:
        source.network.as_timm()  # what it says of a network that is no ViT goes before
        raise UserError(f"--to peft: model_name '{source.saved.config.model_name}' has no adapters; export it as timm, or as "
                        "torchscript or onnx.")
    weights, head = {task: bank.gate.scale * weight for task, weight in network.gate_weights().items()}, source.head
    known, base = _base(source, folder)
    for number, task in enumerate(bank.tasks):
        place = folder / f"adapter_{task}"
        place.mkdir()
        tensors = fused_lora(bank.direction(task), bank.magnitudes()[number].detach())
        rank = len(next(iter(tensors.values())))
        config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": known, "r": rank, "lora_alpha": rank,
                  "target_modules": ["attn.qkv"], "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
                  "inference_mode": True}
        (place / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _write_safetensors(place / "adapter_model.safetensors", tensors)
    _write_safetensors(folder / "head.safetensors", head.to_file())
    names = [f"adapter_{task}" for task in bank.tasks]
    more = "".join(f'model.load_adapter("{each}", adapter_name="{each}")\n' for each in names[1:])
    load = ("import timm\nimport torch.nn.functional as F\nfrom peft import PeftModel\n"
            f"from safetensors.torch import load_file\n\nbase = {base}\n"
            f'model = PeftModel.from_pretrained(base, "{names[0]}", adapter_name="{names[0]}")\n{more}'
            f"model.add_weighted_adapter({json.dumps(names)}, {[weights.get(task, 0.0) for task in bank.tasks]}, \"all\", "
            f'combination_type="cat")\nmodel.set_adapter("all")\nmodel.eval()\nfeatures = model(images)\n'
            f'head = load_file("head.safetensors")\n'
            f"{', '.join(head.to_file())} = {', '.join(f'head[{json.dumps(part)}]' for part in head.to_file())}\n"
            f"logits = {head.predicts}")
    return Exported(load, ("timm", "peft", "safetensors"))


def fused_lora(direction: dict[str, Tensor], magnitude: Tensor) -> dict[str, Tensor]:
    """An adapter, as `AdapterBank.direction` gives it, with its magnitude `[L, 2]`, under PEFT's names: per block A `[2 r, d]`
    and B `[3 d, 2 r]`, with q's part above, v's below and zeros between and beside them."""
    tensors = {}
    for block, factors in enumerate(magnitude):
        (A_q, B_q), (A_v, B_v) = ((direction[f"blocks.{block}.{name}.A"], direction[f"blocks.{block}.{name}.B"] * factor)
                                  for name, factor in zip("qv", factors, strict=True))
        width, rank = B_q.shape
        B = B_q.new_zeros(3 * width, 2 * rank)
        B[:width, :rank], B[2 * width:, rank:] = B_q, B_v
        place = f"base_model.model.blocks.{block}.attn.qkv"
        tensors |= {f"{place}.lora_A.weight": torch.cat([A_q, A_v]), f"{place}.lora_B.weight": B}
    return tensors


def _base(source: Source, folder: Path) -> tuple[str, str]:
    """The name of the frozen network and the code that makes it, with a file where timm alone has not got its weights."""
    name, arguments = source.call
    if not arguments and source.saved.result["backbone"]["source"] == "pretrained":
        return name, f"{_call(name, pretrained=True, num_classes=0)}.eval()"
    _write_safetensors(folder / "base.safetensors", source.saved.backbone().vit.state_dict())
    return name, f'{_call(name, num_classes=0, checkpoint_path="base.safetensors", **arguments)}.eval()'


# ---- whole graphs


def to_torchscript(source: Source, folder: Path) -> Exported:
    """`model.pt`, with everything that the network does, routing included."""
    graph, images, buffer = _graph(source), source.images(3), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch advises other formats, and warns of each check of a shape in timm
        torch.jit.save(torch.jit.trace(graph, images, check_trace=False), buffer)
        (folder / "model.pt").write_bytes(buffer.getvalue())
        again = torch.jit.load(str(folder / "model.pt"))
        difference = _compared("torchscript", source, again)
    load = 'import torch\n\nmodel = torch.jit.load("model.pt").eval()\nlogits = model(images)'
    return Exported(load, ("torch",), difference)


def to_onnx(source: Source, folder: Path) -> Exported:
    """`model.onnx`: `images` to `logits`, for any number of images; routing included. Run with onnxruntime before it is kept.

    Weights of more than a file can hold go to `model.onnx.data`. Raises UserError for a missing package, and a network that
    torch's exporter cannot express.
    """
    _need("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    graph, path = _graph(source), folder / "model.onnx"
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    try:
        with torch.no_grad(), _quiet():
            made = torch.onnx.export(graph, (source.images(3),), dynamo=True, input_names=["images"], output_names=["logits"],
                                     dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False)
            made.save(str(path), external_data=size > _FILE_LIMIT)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--to onnx: torch {torch.__version__} cannot express this network in ONNX ({type(error).__name__}); "
                        "export it as torchscript.") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = _compared("onnx", source, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    load = ('import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
            'logits, = session.run(None, {"images": images.numpy()})')
    return Exported(load, ("onnxruntime",), difference)


FORMATS: dict[str, Callable[[Source, Path], Exported]] = {
    "timm": to_timm, "peft": to_peft, "torchscript": to_torchscript, "onnx": to_onnx}


# ---- shared


def _graph(source: Source) -> nn.Module:
    return source.network.as_graph().requires_grad_(False).eval()


@torch.no_grad()
def _compared(form: str, source: Source, loaded: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of logits between what was loaded again and the network, over the largest logit or 1, at two
    numbers of images; raises UserError where it is not within `CLOSE`."""
    largest = 0.0
    for count in (1, 4):
        images = source.images(count)
        expected, found = source.network(images), loaded(images)
        apart = torch.where(found == expected, 0.0, found - expected).abs().max()  # minus infinities are equal
        finite = expected[expected.isfinite()].abs().max().clamp_min(1)
        largest = max(largest, (apart / finite).nan_to_num(float("inf")).item())
    if largest > CLOSE[form]:
        raise UserError(f"--to {form}: the logits of what it makes differ from the run's by {largest:.1e} of the largest; "
                        f"choose another of {', '.join(FORMATS)}.")
    return largest


def _need(form: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {form}: needs {', '.join(missing)}; install with: pip install {' '.join(packages)}")


@contextmanager
def _quiet() -> Any:
    """Without what torch's exporter prints, warns and logs on its way."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors_bytes(plain, metadata={"format": "pt"}))


def _call(name: str, **arguments: Any) -> str:
    shown = {key: json.dumps(value) if isinstance(value, str) else repr(value) for key, value in arguments.items()}
    return f'timm.create_model("{name}"{"".join(f", {key}={value}" for key, value in shown.items())})'
