"""The smallest example: one prompt, one file, Flux only, no HTTP and no bucket."""

import argparse
from pathlib import Path

import torch

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.generation.prompts import shorten_too_long_text
from stable_diffusion_server.imaging import DigitalSourceType, crop_to_size, encode_image, plan_canvas, xmp_packet
from stable_diffusion_server.pipelines.catalog import spec_of
from stable_diffusion_server.pipelines.loading.components import load_pipeline, quieten_libraries
from stable_diffusion_server.pipelines.loading.footprint import choose_device
from stable_diffusion_server.types import DiffusionRequest, Format, Task

FORMATS = {".webp": Format.WEBP, ".png": Format.PNG, ".jpg": Format.JPEG, ".jpeg": Format.JPEG}


def main() -> None:
    """Draw the prompt of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="a red circle on a blue background")
    parser.add_argument("--out", type=Path, default=Path("flux-schnell.png"), help="file to write (.png, .webp, .jpg)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="512x512", help="width x height in pixels")
    given = parser.parse_args()
    width, _, height = given.size.partition("x")
    if not (width.isdigit() and height.isdigit() and 64 <= int(width) <= 2048 and 64 <= int(height) <= 2048):
        parser.error("--size must be WIDTHxHEIGHT, each from 64 to 2048")
    if given.out.suffix.lower() not in FORMATS:
        parser.error(f"--out must end in one of {', '.join(FORMATS)}")
    if given.steps < 1 or not given.prompt.strip():
        parser.error("--steps must be at least 1, and the prompt not empty")
    try:
        given.out.write_bytes(draw(given.prompt, given.out, given.steps, given.seed, int(width), int(height)))
    except (ServerError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(given.out)  # noqa: T201  # the path is this program's output


def draw(prompt: str, out: Path, steps: int, seed: int, width: int, height: int) -> bytes:
    """The encoded picture of `prompt`, `width` × `height` pixels, in the format `out` is named for."""
    quieten_libraries()  # before the family is imported: transformers warns about optional packages on import
    from stable_diffusion_server.pipelines.families.flux import Flux

    spec = spec_of("flux")
    flux = Flux(load_pipeline(spec, Path(__file__).parent / "models", choose_device("auto")), spec)
    canvas = plan_canvas(width, height, spec.native_pixels, spec.min_side)
    request = DiffusionRequest(
        task=Task.TEXT_TO_IMAGE,
        model=spec.name,
        revision=spec.revision,
        prompt=shorten_too_long_text(prompt, spec.text_tokens, flux.count_tokens),
        negative_prompt=None,
        width=canvas.width,
        height=canvas.height,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=spec.default_guidance,
        scheduler=spec.default_scheduler,
    )
    with torch.inference_mode():
        state = flux.prepare(request)
        while not state.done:
            flux.step([state])
        pixels = flux.finish(state).pixels
    sized = crop_to_size(pixels, width, height, resample=canvas.resampled)
    record = {"prompt": prompt, "seed": seed, "model": spec.name}
    return encode_image(sized, FORMATS[out.suffix.lower()], 85, record, xmp_packet(DigitalSourceType.GENERATED))


if __name__ == "__main__":
    main()
