#!/usr/bin/env bash
# The seed document's second call: a picture of yours drawn anew, kept to its edges.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
picture="${1:-test.jpg}"
curl --fail-with-body --silent --show-error -X POST "$server/style_transfer_bytes_and_upload_image" \
  -F "prompt=anime style" -F "image_file=@$picture" -F "save_path=output.webp"
echo
