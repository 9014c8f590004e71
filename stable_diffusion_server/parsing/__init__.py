"""Strict, bounded parsing of untrusted JSON and Unicode text."""
