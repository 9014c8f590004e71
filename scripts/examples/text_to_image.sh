#!/usr/bin/env bash
# The seed document's first call: a prompt in, the URL of a stored picture out.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
curl --fail-with-body --silent --show-error "$server/create_and_upload_image?prompt=test&save_path=test.webp"
echo
