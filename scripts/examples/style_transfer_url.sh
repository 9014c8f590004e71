#!/usr/bin/env bash
# A picture by its address, drawn anew by a half. The address must be public, or named in FETCH_ALLOW.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
url="${1:?give the address of a PNG, JPEG or WebP picture}"
curl --fail-with-body --silent --show-error "$server/style_transfer_and_upload_image" \
  --data-urlencode "prompt=a green star on a white background" --data-urlencode "image_url=$url" \
  --data "strength=0.5"
echo
