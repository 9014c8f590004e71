"""Pure image functions, image metadata, and sandboxed decoding."""
