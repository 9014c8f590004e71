#!/usr/bin/env bash
# The same by POST, with a JSON body and more to say.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
curl --fail-with-body --silent --show-error "$server/create_and_upload_image" \
  --header 'Content-Type: application/json' \
  --data '{"prompt": "a green star on a yellow background", "model": "flux", "width": 512, "height": 384, "seed": 7}'
echo
