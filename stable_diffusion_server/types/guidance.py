"""What callers add to a prompt: control units, image prompts, and parts of the result that are drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from stable_diffusion_server.types.choices import ExtraValue, ImageInput


class ControlKind(StrEnum):
    """What a control image shows, and so which networks can follow it."""

    CANNY = "canny"
    LINEART = "lineart"
    SOFTEDGE = "softedge"
    SCRIBBLE = "scribble"
    DEPTH = "depth"
    NORMAL = "normal"
    OPENPOSE = "openpose"
    SEGMENTATION = "segmentation"
    TILE = "tile"
    INPAINT = "inpaint"
    BLUR = "blur"
    GRAY = "gray"
    LOW_QUALITY = "low_quality"


class ControlMode(StrEnum):
    """Whether the prompt or the control image counts more where they disagree."""

    BALANCED = "balanced"
    PROMPT = "prompt"
    CONTROL = "control"


class ControlResize(StrEnum):
    """How a control image is brought to the size of the result; pixel-perfect ones are found at that size."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


@dataclass(frozen=True, slots=True)
class ControlUnit:
    """One control image and the network that follows it.

    Attributes:
        kind: What the control image shows; with `model` it may be `None` where the network knows one kind.
        model: Name of the network; by default the first that follows `kind` with the request's model.
        image: The picture; by default the request's input image.
        mask: Where the network is followed (white), everywhere without one.
        weight: Factor of the network's residuals, 0..2; by default the model's.
        start: Share of the steps before the unit takes effect, 0..1.
        end: Share of the steps after which it has none, 0..1.
        preprocess: Name of what makes the control image; by default the kind's own. `none` takes the picture as it is.
        options: Options of the preprocessor by name, sorted.
        mode: Whether prompt or control image counts more.
        resize: How the picture is brought to the size of the result.
        resolution: Shorter side in pixels at which the preprocessor works; by default that of the result.
    """

    kind: ControlKind | None = None
    model: str | None = None
    image: ImageInput | None = None
    mask: ImageInput | None = None
    weight: float | None = None
    start: float = 0.0
    end: float = 1.0
    preprocess: str | None = None
    options: tuple[tuple[str, ExtraValue], ...] = ()
    mode: ControlMode = ControlMode.BALANCED
    resize: ControlResize = ControlResize.CROP
    resolution: int | None = None


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """An image that is read as a prompt is.

    Attributes:
        image: The picture.
        model: Name of the IP-Adapter or Redux file that reads it; by default the first for the request's model.
        weight: How much it counts, 0..2.
        start: Share of the steps before it takes effect, 0..1.
        end: Share of the steps after which it has none, 0..1.
    """

    image: ImageInput
    model: str | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True)
class DetailRepair:
    """Parts of a finished image that a detector finds, each drawn again at full size.

    Attributes:
        detector: Name of the detector's file.
        prompts: What is drawn there, for each part, the last one for all further ones; by default the request's prompt.
        negative_prompts: What is not, likewise.
        confidence: Least score of a part, 0..1.
        most: How many parts are drawn again, the best first.
        least_area: Least share of the image that a part covers, 0..1.
        most_area: Largest share of the image that a part covers, 0..1.
        strength: Share of the denoising steps applied, 0..1.
        steps: Denoising steps; by default the request's.
        padding: Margin in pixels around a part.
        feather: Width in pixels over which the part's edge is softened.
        dilation: By how many pixels the part grows; a negative number shrinks it.
        width: Width in pixels that the part is drawn at; by default the model's.
        height: Its height, likewise.
    """

    detector: str
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    confidence: float = 0.3
    most: int = 4
    least_area: float = 0.0
    most_area: float = 1.0
    strength: float = 0.4
    steps: int | None = None
    padding: int = 32
    feather: int = 4
    dilation: int = 4
    width: int | None = None
    height: int | None = None
