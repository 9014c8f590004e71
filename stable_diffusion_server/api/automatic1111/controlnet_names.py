"""Names and numbers of AUTOMATIC1111's ControlNet extension: detectors, networks with hashes, kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.imaging import NO_PREPROCESSOR, Preprocessor, find_preprocessor
from stable_diffusion_server.types import ControlKind

# The extension's resolution of a detector, and the bounds outside of which it takes that.
USUAL_RESOLUTION, RESOLUTION_LOW, RESOLUTION_HIGH = 512, 64, 2048
INPAINT_MODULE = "inpaint_only"
_INPAINT = "inpaint"
# Tasks by the extension's names for them.
CONTROL_TYPES: Mapping[str, ControlKind] = {
    "Canny": ControlKind.CANNY,
    "Depth": ControlKind.DEPTH,
    "NormalMap": ControlKind.NORMAL,
    "OpenPose": ControlKind.OPENPOSE,
    "Lineart": ControlKind.LINEART,
    "SoftEdge": ControlKind.SOFTEDGE,
    "Scribble": ControlKind.SCRIBBLE,
    "Segmentation": ControlKind.SEGMENTATION,
    "Tile": ControlKind.TILE,
    "Blur": ControlKind.BLUR,
    "Inpaint": ControlKind.INPAINT,
    "Recolor": ControlKind.GRAY,
}
_HASH_CHARACTERS = 8
_FILE_ENDINGS = (".safetensors", ".pth", ".bin", ".ckpt")


def networks_of(context: DialectContext) -> list[tuple[str, str, tuple[ControlKind, ...]]]:
    """Return name, digest and kinds of the ControlNets of all models, their own first. Reads folders; blocks."""
    found: dict[str, tuple[str, str, tuple[ControlKind, ...]]] = {}
    for spec in context.models.values():
        if spec.control_folder:
            name = spec.control_folder.rpartition("/")[2]
            found.setdefault(base_name(name), (name, spec.control_weights, (ControlKind.CANNY,)))
    for spec in context.models.values():
        for network in context.controlnets.usable(spec).values():
            found.setdefault(base_name(network.name), (network.name, network.digest, tuple(network.kinds)))
    return [*found.values()]


def shown_name(name: str, digest: str) -> str:
    """Return the name of a network with the start of its hash, if that is known."""
    return f"{name} [{digest[:_HASH_CHARACTERS]}]" if digest else name


def base_name(model: str) -> str:
    """Return the name of a network without the hash in brackets and the ending of its file, in lower case."""
    name, bracket, _ = model.strip().rpartition(" [")
    name = (name if bracket else model).strip().lower()
    return name.rpartition(".")[0] if name.endswith(_FILE_ENDINGS) else name


def row_of(module: str, field: str) -> Preprocessor | None:
    """Return the preprocessor of a detector, `None` for a ready-made image. Raises `InvalidInput`."""
    name = module.strip().lower()
    return None if name in ("", NO_PREPROCESSOR) or name.startswith(_INPAINT) else find_preprocessor(name, field)


def is_inpainting(module: str) -> bool:
    """Return whether a detector is one of the extension's for inpainting, whose image shows what is repainted."""
    return module.startswith(_INPAINT)


def numbers_of(row: Preprocessor, sent: Sequence[float]) -> dict[str, float]:
    """Return both thresholds as options of a preprocessor; one that is out of its range is the default there."""
    given = {
        option.name: value
        for option, value in zip(row.options, sent, strict=False)
        if option.low <= value <= option.high
    }
    values = {option.name: given.get(option.name, option.default) for option in row.options}
    if values.get("low", 0) > values.get("high", values.get("low", 0)):  # OpenCV exchanges them
        given |= {"low": values["high"], "high": values["low"]}
    return given


def resolution_of(sent: float) -> int:
    """Return the resolution of a detector, the usual one for a number out of its bounds."""
    return round(sent) if RESOLUTION_LOW <= sent <= RESOLUTION_HIGH else USUAL_RESOLUTION
