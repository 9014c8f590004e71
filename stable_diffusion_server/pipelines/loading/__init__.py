"""Loads models from files and places them on devices."""
