#!/usr/bin/env bash
# Restyle an image, following its edges. Generates test.jpg if it is missing.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
[ -e test.jpg ] || curl --fail-with-body --silent --show-error --output test.jpg \
  -F 'prompt=a red circle on a blue background' -F 'format=jpeg' -F 'width=640' -F 'height=480' "$server/make_image"
curl --fail-with-body --silent --show-error -X POST "$server/style_transfer_bytes_and_upload_image" \
  -F "prompt=anime style" -F "image_file=@test.jpg" -F "save_path=output.webp"
echo
