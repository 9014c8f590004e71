#!/usr/bin/env bash
# Save the image itself to a file.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
out="${1:-picture.png}"
curl --fail-with-body --silent --show-error --output "$out" \
  --form 'prompt=a purple heart on a white background' --form 'format=png' --form 'width=512' --form 'height=512' \
  "$server/make_image"
echo "$out"
