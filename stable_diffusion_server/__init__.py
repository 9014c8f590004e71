"""A prompt in, the URL of a stored picture out: SDXL and Flux behind HTTP. Importing this does nothing."""

__version__ = "0.1.0"
