"""Searchable index of generated images, kept beside the bucket."""
