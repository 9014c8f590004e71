"""Decodes untrusted image files in sandboxed processes: `pool` manages them, `worker` is their program."""
