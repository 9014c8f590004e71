"""What Content Credentials cost beside encoding, by format and size, and the server's throughput with and without."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stable_diffusion_server.app.credentials import make_certificate
from stable_diffusion_server.generation.provenance import Authorship, Ingredient, credentials_manifest
from stable_diffusion_server.imaging import ContentSigner, DecoderPool, DigitalSourceType, encode_image, xmp_packet
from stable_diffusion_server.types import Format

SIDES = (256, 512, 1024, 2048)
_THREADS, _PICTURES = 2, 16


def picture(side: int) -> np.ndarray:
    """A gradient with noise, which compresses about as a generated picture does."""
    y, x = np.mgrid[:side, :side] * (256 / side)
    noise = np.random.default_rng(0).normal(0, 6, (side, side, 3))
    return (np.stack([x, y, (x + y) / 2], -1) + noise).clip(0, 255).astype(np.uint8)


def seconds_of(work: Callable[[], object], times: int = 5) -> float:
    """The median CPU seconds of some runs after one that is not counted, since other work shares the machine."""
    work()
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def new_signer() -> ContentSigner:
    """A signer with a certificate of its own."""
    key, mark, chain = make_certificate().partition(b"-----BEGIN CERTIFICATE-----")
    signer = ContentSigner()
    signer.open(mark + chain, key)
    return signer


async def measure(signer: ContentSigner) -> None:
    """Print the tables."""
    pool = DecoderPool(max_bytes=2**25, max_pixels=2**23, max_side=4096)
    signer.sandbox = pool.handle_credentials
    xmp = xmp_packet(DigitalSourceType.GENERATED)
    loop = asyncio.get_running_loop()
    made = Authorship("model", "0" * 64, "0" * 64, DigitalSourceType.GENERATED, (), "a red square on blue")
    created = credentials_manifest(made, with_prompt=True)
    heads = "format|side|file KB|encode CPU ms|sign CPU ms|ratio|bytes|edit: sign ms|bytes|verify ms".split("|")
    print("|", " | ".join(heads), "|")  # noqa: T201  # its output
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")  # noqa: T201  # as above
    for file_format in Format:
        for side in SIDES:
            pixels, quality = picture(side), 100 if file_format is Format.PNG else 85

            def encode(pixels: np.ndarray = pixels, kind: Format = file_format, quality: int = quality) -> bytes:
                return encode_image(pixels, kind, quality, {"digest": "0"}, xmp)

            file = encode()
            encoding = await loop.run_in_executor(None, seconds_of, encode)
            signing = await loop.run_in_executor(None, seconds_of, lambda: signer.sign(file, file_format, created))  # noqa: B023  # awaited here
            signed = signer.sign(file, file_format, created)
            parent = Authorship(
                "model", "0", "0", DigitalSourceType.EDITED, (Ingredient("image", signed, parent=True),)
            )
            manifest = credentials_manifest(parent, with_prompt=True)
            edits, checks = [], []
            for _ in range(6):
                started = time.perf_counter()
                edited = await signer.sign_edited(file, file_format, manifest, [signed], "")
                edits.append(time.perf_counter() - started)
                started = time.perf_counter()
                await pool.handle_credentials({"anchor": signer.anchor}, (signed,), "image")
                checks.append(time.perf_counter() - started)
            cells = [file_format.value, side, len(file) // 1000, f"{encoding * 1e3:.1f}", f"{signing * 1e3:.1f}"]
            cells += [f"{signing / encoding:.2f}", len(signed) - len(file), f"{statistics.median(edits[1:]) * 1e3:.1f}"]
            cells += [len(edited) - len(file), f"{statistics.median(checks[1:]) * 1e3:.1f}"]
            print("|", " | ".join(map(str, cells)), "|")  # noqa: T201  # as above
    await pool.close()
    throughput(signer, created, xmp)


def throughput(signer: ContentSigner, manifest: dict[str, object], xmp: str) -> None:
    """Print images per CPU second of the two encoder threads, in turn with and without signing."""
    pixels = picture(1024)
    for file_format in Format:
        quality = 100 if file_format is Format.PNG else 85

        def plain(_: int, kind: Format = file_format, quality: int = quality) -> bytes:
            return encode_image(pixels, kind, quality, {"digest": "0"}, xmp)

        def signed(turn: int, kind: Format = file_format, work: Callable[[int], bytes] = plain) -> bytes:
            return signer.sign(work(turn), kind, manifest)

        rates: dict[str, list[float]] = {"without": [], "with": []}
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in range(3):
                for name, work in (("without", plain), ("with", signed)):
                    started = time.process_time()
                    list(threads.map(work, range(_PICTURES)))
                    rates[name].append(_PICTURES / (time.process_time() - started))
        best = {name: statistics.median(values) for name, values in rates.items()}
        text = f"{file_format}: without {best['without']:.1f}/s, with {best['with']:.1f}/s, "
        print(text + f"{best['with'] / best['without']:.2f}")  # noqa: T201  # as above


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    asyncio.run(measure(new_signer()))
