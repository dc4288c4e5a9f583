"""The frozen ViT: any timm vision transformer, its weights from the hub, the cache or a local file, and its identity."""

import argparse
import copy
import hashlib
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

import backbone.embedded  # noqa: F401  (registers the embedded ViT with timm)
from utils.errors import UserError, nearest, unknown
from utils.rng import stream_seed

# SD-LoRA's results are with this tag (METHOD.md, section 4); timm's own default for the bare name may change.
DEFAULT_TAGS = {"vit_base_patch16_224": "augreg2_in21k_ft_in1k"}
# Names that the configs of published code give to a network which timm has under another one.
ALIASES = {"vit_base_patch16_224_litelora": "vit_base_patch16_224"}


@dataclass(frozen=True)
class Identity:
    """Which network was frozen: timm's name and tag of it, where its weights came from and their SHA-256."""

    name: str
    tag: str
    source: str  # "pretrained", "random", the local file, or "none" where there are no weights
    sha256: str
    parameters: int


def load_vit(name: str, *, pretrained: bool, weights: str | None, seed: int, image_size: int | None = None
             ) -> tuple[nn.Module, Identity]:
    """A frozen timm ViT in evaluation mode, without classifier, and its identity.

    weights: a local .safetensors, .pth/.pt/.bin or .npz file, used instead of timm's download. Random weights
    (`pretrained` false) follow `seed`. image_size: pixels of the input, if not those of the pretraining, to which the
    position embedding is resized. Raises UserError for an unknown name, a size that the network cannot take, a network whose
    blocks lack the fused attn.qkv linear, and weights that cannot be had or do not fit.
    """
    full_name = _full_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "backbone"))  # torch.manual_seed would reseed CUDA too
        vit, source = _create(full_name, image_size), weights or "random"
        fused_qkv(vit, name)  # before anything is downloaded
        if weights is not None:
            _load_file(vit, Path(weights), name)
        elif pretrained:
            vit, source = _download(full_name, image_size), "pretrained"
    vit.requires_grad_(False).eval()
    made = vit.pretrained_cfg  # for timm's old names, such as vit_base_patch16_224_in21k, what they stand for today
    parameters = sum(tensor.numel() for tensor in vit.state_dict().values())
    return vit, Identity(made["architecture"], made.get("tag") or "", source, weights_sha256(vit.state_dict()), parameters)


def fused_qkv(vit: nn.Module, name: str) -> list[nn.Linear]:
    """The fused `attn.qkv` linear of every block; raises UserError, naming the model, if a block has none."""
    blocks = list(getattr(vit, "blocks", []))
    linears = [getattr(getattr(block, "attn", None), "qkv", None) for block in blocks]
    fused = [isinstance(linear, nn.Linear) and linear.out_features == 3 * linear.in_features for linear in linears]
    # BEiT and EVA add separate biases to the linear's weight themselves, past any layer put in its place.
    split_bias = any(getattr(block.attn, "q_bias", None) is not None for block, ok in zip(blocks, fused) if ok)
    if not blocks or not all(fused) or split_bias:
        raise UserError(f"backbone_type: '{name}' has no fused attn.qkv linear in each of its blocks; choose a timm vision "
                        "transformer that has, such as 'vit_base_patch16_224'.")
    return linears


def merged_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` in which every layer that stands in for a fused `attn.qkv` linear, and has adapters `merged` into its
    weight, is again a plain linear of that weight."""
    copied = copy.deepcopy(module)
    for name, layer in list(copied.named_modules()):
        if isinstance(merged := getattr(layer, "merged", None), Tensor):
            linear = nn.Linear(merged.shape[1], len(merged), bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(merged, requires_grad=False)
            linear.bias = layer.bias
            copied.set_submodule(name, linear)
    return copied


def data_config(vit: nn.Module) -> tuple[int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Image size in pixels and (mean, std) per channel that the model was pretrained with."""
    resolved = timm.data.resolve_model_data_config(vit)
    return resolved["input_size"][-1], (tuple(resolved["mean"]), tuple(resolved["std"]))


def weights_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _full_name(name: str) -> str:
    """`name` with its tag; unknown names and tags are refused with the nearest known one."""
    bare, _, tag = ALIASES.get(name, name).partition(".")
    if not timm.is_model(bare):
        known = timm.list_models("*vit*")
        raise UserError(f"backbone_type: '{name}' is not a timm model; any timm vision transformer with a fused attn.qkv can "
                        f"be named, for example 'vit_base_patch16_224'.{nearest(bare, known)}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
    if not tag:
        tag = DEFAULT_TAGS.get(bare, tags[0] if tags else "")
        default = timm.get_pretrained_cfg(bare)
        if bare not in DEFAULT_TAGS and default is not None and default.tag:
            tag = default.tag
    elif tag not in tags:
        raise unknown("backbone_type", name, [f"{bare}.{known}" for known in tags] or [bare])
    return f"{bare}.{tag}" if tag else bare


def _create(name: str, image_size: int | None, pretrained: bool = False) -> nn.Module:
    """timm's model `name`, for inputs of `image_size` pixels if not None; raises UserError for a size that it cannot take."""
    if image_size is None:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size)
        patch = vit.patch_embed.patch_size[0]
    except (TypeError, AttributeError) as error:  # networks whose size is fixed, or that have no patches
        raise UserError(f"image_size: '{name}' takes images of its own size alone; leave it out.") from error
    if image_size % patch:
        near = sorted({max(1, image_size // patch) * patch, (image_size // patch + 1) * patch})
        raise UserError(f"image_size: {image_size} is not a multiple of {patch}, the pixels of a patch of '{name}'; choose "
                        f"{' or '.join(map(str, near))}.")
    return vit


def _download(name: str, image_size: int | None) -> nn.Module:
    hub = logging.getLogger("huggingface_hub")  # without a network it would print every one of its retries
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        return _create(name, image_size, pretrained=True)
    except Exception as error:  # timm and the hub raise many kinds: no network, no such file, a damaged cache
        raise UserError(
            f"backbone_type: the pretrained weights of '{name}' are not in the cache and could not be downloaded "
            f"({type(error).__name__}); run once with a network, set 'backbone_weights' to a local file, or set "
            "'pretrained' to false for random weights.") from error
    finally:
        hub.setLevel(level)


def _load_file(vit: nn.Module, path: Path, name: str) -> None:
    """Fills `vit` from `path`, in timm's naming, in its authors' as timm converts it, or in Flax's (.npz).

    Position embeddings are resized to the model's image size, as timm does; everything else has to fit exactly.
    """
    if not path.is_file():
        raise UserError(f"backbone_weights: there is no file '{path}'; give a .safetensors, .pth or .npz file of '{name}'.")
    wanted = vit.state_dict()
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                patches = [arrays[key].shape[:2] for key in arrays.files if key.endswith("embedding/kernel")]
            vit.load_pretrained(str(path))
            state = wanted
        else:
            state = _read_state(path)
            patches = [state[key].shape[2:] for key in ("patch_embed.proj.weight", "visual.conv1.weight") if key in state]
            state = checkpoint_filter_fn(state, vit, adapt_layer_scale=True) if isinstance(vit, VisionTransformer) else state
    except UserError:
        raise
    except Exception as error:  # truncated, foreign or damaged in one of many ways: name the file, do not guess further
        raise UserError(f"backbone_weights: '{path}' could not be read as weights of '{name}' ({_reason(error)}); get the "
                        "file again or choose the matching backbone_type.") from error
    if problem := _misfit(state, wanted, patches):
        raise UserError(f"backbone_weights: '{path}' does not fit '{name}': {problem}; choose the matching backbone_type or "
                        "file.")
    vit.load_state_dict({key: state[key] for key in wanted})


# What a ViT makes its tokens with. Other entries of a file that a model lacks, such as a classifier, do not matter to it.
_TOKEN_PARTS = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "blocks")


def _misfit(state: dict[str, Tensor], wanted: dict[str, Tensor], patches: list[tuple[int, ...]]) -> str | None:
    """The first thing that keeps `state` from being the network `wanted`; patches: sizes [h, w] before timm's conversion."""
    for key in sorted(set(wanted) - set(state)):
        return f"it lacks '{key}'"
    for key in sorted(set(state) - set(wanted)):
        if key.split(".")[0] in _TOKEN_PARTS:
            return f"it has '{key}', which the model lacks"
    for key in wanted:
        if state[key].shape != wanted[key].shape:
            return f"'{key}' has shape {tuple(state[key].shape)} where {tuple(wanted[key].shape)} is needed"
    for found in patches:
        # timm would stretch the filters to the model's patches: a network that nobody has trained
        if len(found) == 2 and tuple(found) != (needed := tuple(wanted["patch_embed.proj.weight"].shape[2:])):
            return f"its patches are {found[0]} x {found[1]} pixels where {needed[0]} x {needed[1]} are needed"
    return None


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise UserError(f"backbone_weights: '{path}' has an unknown ending; give a .safetensors, .pth or .npz file.")
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO and DeiT keep their arguments beside the weights
        state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"backbone_weights: '{path}' does not hold a state dict of tensors; save one with torch.save.")
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to load the file without its safeguard
        return "it is no PyTorch file, or holds more than tensors"
    text = " ".join(str(error).split())
    return f"{text[:200]}..." if len(text) > 200 else text or type(error).__name__
