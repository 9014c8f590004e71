"""Pure image functions, image metadata, and sandboxed decoding."""

from __future__ import annotations

from stable_diffusion_server.imaging.artifact_detection import is_black, score_artifacts
from stable_diffusion_server.imaging.canvas import ALIGNMENT, Canvas, crop_to_size, plan_canvas, to_canvas
from stable_diffusion_server.imaging.control_images.line_maps import thin_lines
from stable_diffusion_server.imaging.control_images.preprocessor import (
    RESOLUTION,
    NeededFile,
    Preprocessor,
    PreprocessorOption,
    control_size,
    to_resolution,
)
from stable_diffusion_server.imaging.control_images.preprocessor_rows import (
    NO_PREPROCESSOR,
    PREPROCESSORS,
    draw_control,
    find_preprocessor,
    preprocessors_of,
)
from stable_diffusion_server.imaging.edges import canny
from stable_diffusion_server.imaging.encode import ContentSigner, Sandbox, encode_image
from stable_diffusion_server.imaging.extension import cover_cells, extend_image, extend_mask
from stable_diffusion_server.imaging.formats import (
    DEFAULT_FORMATS,
    OPTIONAL_FORMATS,
    SIGNATURE_BYTES,
    describe_formats,
    is_complete_file,
    is_image_object,
    matches_signature,
    media_type_of,
    media_types,
)
from stable_diffusion_server.imaging.infotext import (
    LATENT_UPSCALERS,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    parameters_text,
    parse_parameters,
)
from stable_diffusion_server.imaging.masks import binarize_mask, feather_mask, paste_back, to_mask
from stable_diffusion_server.imaging.metadata import (
    DigitalSourceType,
    read_parameters_text,
    read_record,
    source_type_of,
    xmp_packet,
)
from stable_diffusion_server.imaging.resize import (
    CropBox,
    Pixels,
    crop_around,
    fill_masked,
    fit_image,
    resize_image,
    shrink_to_area,
)
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool
from stable_diffusion_server.imaging.upscaling import Resampling, blend, crop_to_aspect, upscale

__all__ = [
    "ALIGNMENT",
    "DEFAULT_FORMATS",
    "LATENT_UPSCALERS",
    "NO_PREPROCESSOR",
    "OPTIONAL_FORMATS",
    "PREPROCESSORS",
    "RESOLUTION",
    "SAMPLER_NAMES",
    "SCHEDULE_NAMES",
    "SIGNATURE_BYTES",
    "Canvas",
    "ContentSigner",
    "CropBox",
    "DecoderPool",
    "DigitalSourceType",
    "NeededFile",
    "Pixels",
    "Preprocessor",
    "PreprocessorOption",
    "Resampling",
    "Sandbox",
    "binarize_mask",
    "blend",
    "canny",
    "control_size",
    "cover_cells",
    "crop_around",
    "crop_to_aspect",
    "crop_to_size",
    "describe_formats",
    "draw_control",
    "encode_image",
    "extend_image",
    "extend_mask",
    "feather_mask",
    "fill_masked",
    "find_preprocessor",
    "fit_image",
    "is_black",
    "is_complete_file",
    "is_image_object",
    "matches_signature",
    "media_type_of",
    "media_types",
    "parameters_text",
    "parse_parameters",
    "paste_back",
    "plan_canvas",
    "preprocessors_of",
    "read_parameters_text",
    "read_record",
    "resize_image",
    "score_artifacts",
    "shrink_to_area",
    "source_type_of",
    "thin_lines",
    "to_canvas",
    "to_mask",
    "to_resolution",
    "upscale",
    "xmp_packet",
]
