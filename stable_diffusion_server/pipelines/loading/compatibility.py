"""Checks by their configurations that the components of a model fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stable_diffusion_server.errors import ModelLoadError

# Tokenizers and the encoders that read their tokens.
TOKENIZERS = (
    ("tokenizer", "text_encoder"),
    ("tokenizer_2", "text_encoder_2"),
    ("tokenizer_3", "text_encoder_3"),
)
# What a transformer's ControlNet has in common with it.
_OF_TRANSFORMERS = (
    *("in_channels", "joint_attention_dim", "pooled_projection_dim"),
    *("num_attention_heads", "attention_head_dim"),
)


def check_pipeline(folder: str, pipeline: Any) -> None:
    """Raise `ModelLoadError` when the components of a text-to-image pipeline do not fit each other.

    Otherwise every image would fail halfway, or be noise. `folder` is named in the error.
    """
    check = _CHECKS.get(type(pipeline).__name__.partition("Pipeline")[0].removesuffix("Inpaint"))
    if check is not None:
        vae = pipeline.vae
        if not hasattr(vae, "quant_conv"):
            raise ModelLoadError(
                f"{folder}/vae holds a {type(vae).__name__}, and an AutoencoderKL is needed to encode pictures."
            )
        check(folder, pipeline, vae.config.latent_channels)
    for tokenizer, encoder in TOKENIZERS:
        if getattr(pipeline, tokenizer, None) is None or getattr(pipeline, encoder, None) is None:
            continue
        config = getattr(pipeline, encoder).config
        words, known = len(getattr(pipeline, tokenizer)), config.get_text_config().vocab_size
        if words > known:
            raise ModelLoadError(
                f"{folder}/{tokenizer} has {words} tokens, and {folder}/{encoder} knows {known}: one of another model."
            )


def check_controlnet(folder: str, pipeline: Any, controlnet: Any) -> None:
    """Raise `ModelLoadError` when a ControlNet was made for another model than `pipeline`'s."""
    if hasattr(pipeline, "unet"):
        names: Iterable[str] = ("in_channels", "cross_attention_dim", "block_out_channels", "addition_time_embed_dim")
        whole = pipeline.unet.config
    else:
        of_flux, of_z_image = _OF_TRANSFORMERS, ("dim", "n_heads")
        names, whole = of_z_image if "dim" in controlnet.config else of_flux, pipeline.transformer.config
    for name in names:
        own, wanted = controlnet.config.get(name), whole.get(name)
        if own is None and name == "joint_attention_dim":
            continue  # SD 3.5's networks read no prompt
        if own != wanted and not (isinstance(own, list | tuple) and [*own] == [*wanted]):
            raise ModelLoadError(f"{folder} was made for another model: its {name} is {own}, and the model's {wanted}.")
    config = controlnet.config
    if config.get("extra_conditioning_channels") or config.get("conditioning_channels", 3) != 3:
        raise ModelLoadError(f"{folder} takes more than the colours of a control image, which is not supported.")


def check_refiner(folder: str, pipeline: Any, refiner: Any) -> None:
    """Raise `ModelLoadError` when a UNet is no refiner for an SDXL pipeline, whose second text encoder it reads."""
    config, encoder = refiner.config, pipeline.text_encoder_2.config
    channels = pipeline.unet.config.in_channels
    _check_equal(
        folder,
        ("unet", "in_channels", config.in_channels, "the base model's", channels),
        ("unet", "cross_attention_dim", config.cross_attention_dim, "what text_encoder_2 gives", encoder.hidden_size),
        (
            "unet",
            "projection_class_embeddings_input_dim",
            config.projection_class_embeddings_input_dim,
            "what text_encoder_2, the size, the crop and the score give",
            encoder.projection_dim + 5 * (config.addition_time_embed_dim or 0),
        ),
    )


def check_redux(folder: str, pipeline: Any, embedder: Any) -> None:
    """Raise `ModelLoadError` when Redux gives embeddings of another width than a Flux transformer takes."""
    taken = pipeline.transformer.config.joint_attention_dim
    _check_equal(
        folder, ("image_embedder", "txt_in_features", embedder.config.txt_in_features, "the transformer takes", taken)
    )


def _check_sdxl(folder: str, pipeline: Any, latent_channels: int) -> None:
    config, projection = pipeline.unet.config, pipeline.text_encoder_2.config.projection_dim
    texts = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    _check_unet(folder, pipeline, latent_channels, texts)
    _check_equal(
        folder,
        (
            "unet",
            "projection_class_embeddings_input_dim",
            config.projection_class_embeddings_input_dim,
            "what text_encoder_2 and the sizes give",
            projection + 6 * config.addition_time_embed_dim,
        ),
    )


def _check_sd15(folder: str, pipeline: Any, latent_channels: int) -> None:
    if pipeline.unet.config.addition_embed_type is not None:
        raise ModelLoadError(f"{folder}/unet takes more than a prompt, which is not given here.")
    _check_unet(folder, pipeline, latent_channels, pipeline.text_encoder.config.hidden_size)


def _check_unet(folder: str, pipeline: Any, latent_channels: int, texts: int) -> None:
    """`texts` is the width of what the text encoders give."""
    config = pipeline.unet.config
    inpaints = "Inpaint" in type(pipeline).__name__
    # An inpainting UNet also takes the mask, one channel, and the masked image.
    if config.in_channels != (2 * latent_channels + 1 if inpaints else latent_channels):
        raise ModelLoadError(
            f"{folder}/unet takes {config.in_channels} channels, and one that draws from text takes the VAE's "
            f"{latent_channels}: it was made for inpainting or the like."
        )
    _check_equal(
        folder,
        ("unet", "out_channels", config.out_channels, "the VAE's channels", latent_channels),
        ("unet", "cross_attention_dim", config.cross_attention_dim, "what the text encoders give", texts),
    )
    if config.time_cond_proj_dim is not None:
        raise ModelLoadError(f"{folder}/unet was distilled with its guidance as an input, which is not given here.")


def _check_fill(folder: str, pipeline: Any, latent_channels: int) -> None:
    # Beside the latents, those of the visible image, and the mask's pixels, each as a channel.
    _check_transformer(folder, pipeline, latent_channels, 4 * (latent_channels + pipeline.vae_scale_factor**2))


def _check_transformer(folder: str, pipeline: Any, latent_channels: int, more: int = 0) -> None:
    """`more` are the channels that the transformer takes beside the latents."""
    config = pipeline.transformer.config
    # A patch packs 2 × 2 latent pixels into channels.
    if more and config.in_channels != 4 * latent_channels + more:
        raise ModelLoadError(
            f"{folder}/transformer takes {config.in_channels} channels, and one for filling takes "
            f"{4 * latent_channels + more}."
        )
    if not more and config.in_channels != 4 * latent_channels:
        raise ModelLoadError(
            f"{folder}/transformer takes {config.in_channels} channels, and one that draws from text takes "
            f"{4 * latent_channels}: it was made for filling, control or the like."
        )
    _check_equal(
        folder,
        (
            "transformer",
            "joint_attention_dim",
            config.joint_attention_dim,
            "what text_encoder_2 gives",
            pipeline.text_encoder_2.config.d_model,
        ),
        (
            "transformer",
            "pooled_projection_dim",
            config.pooled_projection_dim,
            "what text_encoder gives",
            pipeline.text_encoder.config.hidden_size,
        ),
    )


def _check_klein(folder: str, pipeline: Any, latent_channels: int) -> None:
    config, encoder = pipeline.transformer.config, pipeline.text_encoder.config
    if not hasattr(pipeline.vae, "bn"):
        raise ModelLoadError(f"{folder}/vae holds a {type(pipeline.vae).__name__}, and FLUX.2's is needed.")
    _check_equal(
        folder,
        # A patch packs 2 × 2 latent pixels into channels.
        ("transformer", "in_channels", config.in_channels, "the VAE gives", 4 * latent_channels),
        (
            "transformer",
            "joint_attention_dim",
            config.joint_attention_dim,
            "three layers give",
            3 * encoder.hidden_size,
        ),
    )
    # The embeddings are the hidden states 9, 18 and 27.
    if encoder.num_hidden_layers < 27:
        raise ModelLoadError(f"{folder}/text_encoder has {encoder.num_hidden_layers} layers, and 27 are read.")


def _check_z_image(folder: str, pipeline: Any, latent_channels: int) -> None:
    config = pipeline.transformer.config
    _check_equal(
        folder,
        ("transformer", "in_channels", config.in_channels, "the VAE gives", latent_channels),
        (
            "transformer",
            "cap_feat_dim",
            config.cap_feat_dim,
            "the text encoder",
            pipeline.text_encoder.config.hidden_size,
        ),
    )


def _check_sd3(folder: str, pipeline: Any, latent_channels: int) -> None:
    config = pipeline.transformer.config
    clip = pipeline.text_encoder.config.projection_dim + pipeline.text_encoder_2.config.projection_dim
    _check_equal(
        folder,
        ("transformer", "in_channels", config.in_channels, "the VAE gives", latent_channels),
        ("transformer", "pooled_projection_dim", config.pooled_projection_dim, "both CLIP encoders give", clip),
    )
    if pipeline.text_encoder_3 is not None:
        width = pipeline.text_encoder_3.config.d_model
        _check_equal(
            folder, ("transformer", "joint_attention_dim", config.joint_attention_dim, "text_encoder_3 gives", width)
        )


# Pipeline class, without what follows its model's name → the check of its denoiser.
_CHECKS: Mapping[str, Callable[[str, Any, int], None]] = {
    "StableDiffusionXL": _check_sdxl,
    "StableDiffusion": _check_sd15,
    "StableDiffusion3": _check_sd3,
    "Flux": _check_transformer,
    "Flux2Klein": _check_klein,
    "ZImage": _check_z_image,
    "FluxFill": _check_fill,
    "FluxKontext": _check_transformer,
}


def _check_equal(folder: str, *pairs: tuple[str, str, Any, str, Any]) -> None:
    for part, name, own, source, wanted in pairs:
        if isinstance(own, int) and own != wanted:
            raise ModelLoadError(f"{folder}/{part} has a {name} of {own}, and {source} {wanted}: they do not fit.")
