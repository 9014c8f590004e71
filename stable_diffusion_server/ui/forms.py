"""What the fields of the studio ask for: values out of fields → wishes. Pure; bounds are the server's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stable_diffusion_server.ui.client import UiRequest

CREATE, RESTYLE = "/create_and_upload_image", "/style_transfer_bytes_and_upload_image"
INPAINT = "/inpaint_and_upload_image"

SEED_END = 2**32
MOST_AT_ONCE = 8
# What the original server's page drew at one click: the prompt, and the prompt with each of these behind it.
EXPLORED = ("", "awesome", "amazing", "detailed aesthetic", "wonderful", "anime hd")


class FormError(ValueError):
    """What can be seen to be wrong before anything is asked: the field, and a sentence."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


@dataclass(frozen=True, slots=True)
class CommonFields:
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


def create(
    common: CommonFields, width: float | None, height: float | None, *, explore: bool = False
) -> list[UiRequest]:
    """Text to image: as many as asked, each with a seed one further; or the six of `explore`, all with one seed."""
    fields = {**common.fields(), "width": number(width), "height": number(height)}
    if not explore:
        return several(common, UiRequest(CREATE, fields))
    one = replace(common, count=1)
    return [
        wish
        for suffix in EXPLORED
        for wish in several(
            one,
            UiRequest(
                CREATE, {**fields, "prompt": f"{common.prompt} {suffix}".rstrip()}, name=suffix or "as it was written"
            ),
        )
    ]


def restyle(
    common: CommonFields, image: bytes, strength: float, *, canny: bool, low: float = 100, high: float = 200
) -> list[UiRequest]:
    """A picture drawn anew, by its edges if `canny`."""
    fields = {**common.fields(), "strength": number(strength), "canny": str(canny).lower()}
    if canny:
        fields |= {"canny_low": number(low), "canny_high": number(high)}
    return several(common, UiRequest(RESTYLE, fields, {"image_file": image}))


def inpaint(
    common: CommonFields, image: bytes, mask: bytes, strength: float, feather: float, *, refine: bool
) -> list[UiRequest]:
    """The masked part of a picture drawn anew."""
    fields = {
        **common.fields(),
        "strength": number(strength),
        "feather": number(feather),
        "refine": str(refine).lower(),
    }
    return several(common, UiRequest(INPAINT, fields, {"image_file": image, "mask_file": mask}))


def several(common: CommonFields, wish: UiRequest) -> list[UiRequest]:
    """So many pictures of one wish, their seeds counted up from the one given."""
    if common.seed.isdecimal():
        seeds = [str(int(common.seed) + further) for further in range(common.count)]
    else:
        seeds = [common.seed or "random"] * common.count
    return [replace(wish, fields={**wish.fields, "seed": seed}) for seed in seeds]


def number(value: float | None) -> str:
    """A number as a request has it: whole ones without a point, none as nothing."""
    return "" if value is None else f"{value:g}" if value != int(value) else str(int(value))
