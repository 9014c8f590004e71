"""What the fields of the studio ask for: values out of fields → wishes. Pure; bounds are the server's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stable_diffusion_server.ui.desk import Wish

CREATE, RESTYLE = "/create_and_upload_image", "/style_transfer_bytes_and_upload_image"
INPAINT = "/inpaint_and_upload_image"

SEED_END = 2**32
MOST_AT_ONCE = 8
SIZES = ((256, 256), (512, 512), (768, 512), (512, 768), (1024, 1024))
# What the original server's page drew at one click: the prompt, and the prompt with each of these behind it.
EXPLORED = ("", "awesome", "amazing", "detailed aesthetic", "wonderful", "anime hd")

EMBEDDED_PROMPTS = (
    "a red circle on a blue background",
    "a large yellow star on a purple background",
    "a small green triangle in the top left on a white background",
    "a pink heart above a blue square on a black background",
    "three orange hexagons on a cyan background",
    "a white cross on a brown background",
)
PROMPTS = (
    "a lighthouse on a cliff at dusk, oil painting",
    "portrait of an old sailor, soft window light",
    "a cup of coffee beside a rainy window, photograph",
    "a fox in the snow, woodblock print",
)
EMBEDDED_WORDS = (
    "The embedded models know circles, squares, triangles, stars, diamonds, hexagons, hearts and crosses in red, "
    "green, blue, yellow, orange, purple, pink, cyan, white, black, gray and brown, on a background of another colour."
)


@dataclass(frozen=True, slots=True)
class Common:
    """What every tab asks of a picture; empty text leaves it to the server."""

    prompt: str
    negative: str = ""
    model: str = ""
    steps: str = ""
    guidance: str = ""
    seed: str = ""
    count: int = 1

    def fields(self) -> dict[str, str]:
        """The fields that are the same for each picture of a click."""
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "model": self.model,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        return {name: value for name, value in given.items() if value or name == "prompt"}


def create(common: Common, width: float | None, height: float | None, *, explore: bool = False) -> list[Wish]:
    """Text to image: as many as asked, each with a seed one further; or the six of `explore`, all with one seed."""
    fields = {**common.fields(), "width": number(width), "height": number(height)}
    if not explore:
        return several(common, Wish(CREATE, fields))
    prompts = [f"{common.prompt} {suffix}".rstrip() for suffix in EXPLORED]
    return [
        wish for text in prompts for wish in several(replace(common, count=1), Wish(CREATE, {**fields, "prompt": text}))
    ]


def restyle(
    common: Common, image: bytes, strength: float, *, canny: bool, low: float = 100, high: float = 200
) -> list[Wish]:
    """A picture drawn anew, by its edges if `canny`."""
    fields = {**common.fields(), "strength": number(strength), "canny": str(canny).lower()}
    if canny:
        fields |= {"canny_low": number(low), "canny_high": number(high)}
    return several(common, Wish(RESTYLE, fields, {"image_file": image}))


def inpaint(common: Common, image: bytes, mask: bytes, strength: float, feather: float, *, refine: bool) -> list[Wish]:
    """The masked part of a picture drawn anew."""
    fields = {
        **common.fields(),
        "strength": number(strength),
        "feather": number(feather),
        "refine": str(refine).lower(),
    }
    return several(common, Wish(INPAINT, fields, {"image_file": image, "mask_file": mask}))


def several(common: Common, wish: Wish) -> list[Wish]:
    """So many pictures of one wish, their seeds counted up from the one given."""
    if common.seed.isdecimal():
        seeds = [str(int(common.seed) + further) for further in range(common.count)]
    else:
        seeds = [common.seed or "random"] * common.count
    return [replace(wish, fields={**wish.fields, "seed": seed}) for seed in seeds]


def number(value: float | None) -> str:
    """A number as a request has it: whole ones without a point, none as nothing."""
    return "" if value is None else f"{value:g}" if value != int(value) else str(int(value))


def prompts_for(folders: Sequence[str]) -> tuple[str, ...]:
    """Prompts worth a try, by the folders of the models that are loaded."""
    real = folders and not any(folder.startswith("embedded") for folder in folders)
    return PROMPTS if real else EMBEDDED_PROMPTS
