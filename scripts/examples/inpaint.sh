#!/usr/bin/env bash
# Repaint a picture where a mask is white; as PNG every other pixel stays exactly as it was.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
picture="${1:?give a picture}" mask="${2:?give a mask, white where to repaint}"
curl --fail-with-body --silent --show-error "$server/inpaint_and_upload_image" \
  -F "prompt=a yellow square on a blue background" -F "image_file=@$picture" -F "mask_file=@$mask" \
  -F "feather=4" -F "format=png"
echo
