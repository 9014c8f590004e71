"""Optimizations of loaded models: memory layout, compilation, graphs, fused kernels."""
