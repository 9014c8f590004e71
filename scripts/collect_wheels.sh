#!/bin/sh
# Fetches what `python -m benchmarks.gpu` needs beside PyTorch into wheels/, for a machine without a network.
# There: pip install --no-index --no-deps --target site wheels/*.whl, and PYTHONPATH=site.
# Usage: scripts/collect_wheels.sh [python-version] [platform]
set -eu
python_version="${1:-3.12}"
platform="${2:-manylinux2014_x86_64}"
mkdir -p wheels
for package in diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 tokenizers safetensors huggingface_hub hf-xet \
    regex structlog importlib_metadata zipp httpx httpcore h11 anyio idna certifi sniffio pillow psutil peft==0.21.2 \
    optimum-quanto==0.2.7 ninja filelock; do
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
        --implementation cp --platform "$platform" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform any --dest wheels "$package"
done
du -sh wheels
