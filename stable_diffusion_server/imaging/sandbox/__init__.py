"""Untrusted bytes to pixels, in processes that may die. `pool` asks; `child` is the program those processes run."""
