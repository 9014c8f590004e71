#!/bin/sh
# Fetches what `python -m benchmarks.gpu` needs beside PyTorch and NumPy into wheels/, for a machine without a network.
# There: pip install --no-index --no-deps --target site wheels/*.whl, and PYTHONPATH=site.
# Usage: scripts/collect_wheels.sh [python-version] [platform]; with DRY=--dry-run nothing is fetched.
set -eu
python_version="${1:-3.12}"
platform="${2:-manylinux2014_x86_64}"
mkdir -p wheels
download() {
    python3 -m pip "$@" --quiet --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
        --platform "$platform" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform any
}
# What diffusers, transformers, accelerate, peft and the quantizers require, then what the server itself does, and what
# those require, by name, since PyTorch itself and what comes with it are there already and must not be replaced.
for package in diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 optimum-quanto==0.2.7 \
    tokenizers safetensors huggingface_hub hf-xet regex packaging pyyaml tqdm requests urllib3 charset-normalizer \
    importlib_metadata zipp httpx2 httpcore2 truststore h11 anyio idna certifi click fsspec filelock typing_extensions ninja \
    structlog pillow psutil setuptools torchao==0.18.0 \
    fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 fastapi-swagger==0.4.64 python-multipart==0.0.34 pydantic==2.14.4 \
    pydantic_core==2.50.5 pydantic-settings==2.16.3 python-dotenv annotated-types annotated-doc typing-inspection \
    httpx==0.28.1 httpcore prometheus-client==0.26.0 limits==5.8.0 deprecated wrapt orjson==3.13.0 brotli opentelemetry-api; do
    if [ -n "${DRY:-}" ]; then
        download install --dry-run --target wheels "$package"
    else
        download download --dest wheels "$package"
    fi
    echo "$package"
done
du -sh wheels
