"""Enlarges images with upscaler networks: finds their files, reads them, runs them in tiles."""
