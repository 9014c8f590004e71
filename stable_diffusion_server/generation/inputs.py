"""Input images: downloads URLs, decodes files, and places images on the model's canvas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from stable_diffusion_server.generation.interfaces import DecodeImage, FetchImage
from stable_diffusion_server.generation.layout import ImageLayout, lay_out_images
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.generation.single_flight import SingleFlight
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import Caller, GenerationRequest, ImageInput


class InputLoader:
    """Loads the input images of requests. For one event loop."""

    def __init__(self, fetch: FetchImage, decode: DecodeImage) -> None:
        self._fetch = fetch
        self._decode = decode
        self._downloads: SingleFlight[bytes] = SingleFlight()

    async def fetch_files(
        self, request: GenerationRequest, fetched: Mapping[str, bytes], caller: Caller
    ) -> dict[str, bytes]:
        """Download the request's URLs. Returns the files by parameter; reuses the files in `fetched`."""
        remote = [source for source in request.sources if source.url is not None and source.parameter not in fetched]
        data = await asyncio.gather(*(self._download(source, caller.share) for source in remote))
        return {**fetched, **{source.parameter: file for source, file in zip(remote, data, strict=True)}}

    async def _download(self, source: ImageInput, share: str) -> bytes:
        """Download the file at a URL. Concurrent downloads of the same URL by one caller share one task.

        Callers do not share a task, because a download waits in the fair queue of the caller that started it.
        """
        url, parameter = source.url or "", source.parameter
        data, _ = await self._downloads.join(
            f"{share} {url}", parameter, lambda _: self._fetch(url, parameter, share=share)
        )
        return data

    async def lay_out(self, resolved: ResolvedRequest, fetched: Mapping[str, bytes], share: str) -> ImageLayout:
        """Decode the input images and place them on the model's canvas."""

        async def pixels_of(source: ImageInput | None) -> Pixels | None:
            if source is None:
                return None
            data = source.data if source.data is not None else fetched[source.parameter]
            return await self._decode(data, source.parameter, transparency=source.transparency, share=share)

        image, mask = await asyncio.gather(pixels_of(resolved.request.image), pixels_of(resolved.request.mask))
        return await asyncio.to_thread(lay_out_images, resolved, image, mask)
