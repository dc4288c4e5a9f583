"""The frozen ViT: any timm vision transformer, its weights from the hub, the cache or a local file, and its identity."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Identity:
    """Which network was frozen: timm name and tag, and the SHA-256 of its weights."""

    name: str
    tag: str
    source: str  # "pretrained", "random" or the local file
    sha256: str
    parameters: int


def load_vit(name: str, *, pretrained: bool, weights: str | None, seed: int) -> tuple[nn.Module, Identity]:
    """A frozen timm ViT in evaluation mode, without classifier, and its identity.

    weights: a local .safetensors, .pth/.pt/.bin or .npz file, used instead of timm's download. Random weights
    (`pretrained` false) follow `seed`. Raises UserError for an unknown name, weights that cannot be had or do not fit.
    """
    full_name = _full_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "backbone"))
        if pretrained and weights is None:
            vit, source = _download(full_name), "pretrained"
        else:
            vit, source = timm.create_model(full_name, pretrained=False, num_classes=0), weights or "random"
    if weights is not None:
        _load_file(vit, Path(weights), name)
    vit.requires_grad_(False).eval()
    bare, _, tag = full_name.partition(".")
    parameters = sum(tensor.numel() for tensor in vit.state_dict().values())
    return vit, Identity(bare, tag, source, weights_sha256(vit.state_dict()), parameters)


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
    bare, _, tag = name.partition(".")
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


def _download(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub raise many kinds: no network, no such file, a damaged cache
        raise UserError(
            f"backbone_type: the pretrained weights of '{name}' are not in the cache and could not be downloaded "
            f"({type(error).__name__}); run once with a network, set 'backbone_weights' to a local file, or set "
            "'pretrained' to false for random weights.") from error


def _load_file(vit: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise UserError(f"backbone_weights: there is no file '{path}'; give a .safetensors, .pth or .npz file of '{name}'.")
    try:
        if path.suffix == ".npz":
            vit.load_pretrained(str(path))
            return
        state = _read_state(path)
        state = checkpoint_filter_fn(state, vit) if isinstance(vit, VisionTransformer) else state
    except UserError:
        raise
    except Exception as error:  # truncated, foreign or damaged in one of many ways: name the file, do not guess further
        raise UserError(f"backbone_weights: '{path}' could not be read as weights of '{name}' ({error}); get the file "
                        "again or choose the matching backbone_type.".replace("\n", " ")) from error
    wanted = vit.state_dict()
    missing = sorted(set(wanted) - set(state))
    misfits = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or misfits:
        key = (missing + misfits)[0]
        found = f"has shape {tuple(state[key].shape)}" if misfits and not missing else "is missing"
        raise UserError(f"backbone_weights: '{path}' does not fit '{name}': '{key}' {found} where {tuple(wanted[key].shape)} "
                        "is needed; choose the matching backbone_type or file.")
    vit.load_state_dict({key: state[key] for key in wanted})


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise UserError(f"backbone_weights: '{path}' has an unknown ending; give a .safetensors, .pth or .npz file.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"backbone_weights: '{path}' does not hold a state dict of tensors; save one with torch.save.")
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
