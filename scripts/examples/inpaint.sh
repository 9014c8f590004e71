#!/usr/bin/env bash
# Inpaint an image where a mask is white. In a PNG all other pixels stay unchanged.
set -euo pipefail
server="${SERVER:-http://localhost:8000}"
generate() { # an input image, and one used as mask
  curl --fail-with-body --silent --show-error --output "$1" -F "prompt=$2" -F 'format=png' -F 'width=512' \
    -F 'height=512' "$server/make_image"
}
[ -e picture.png ] || generate picture.png 'a red circle on a blue background'
[ -e mask.png ] || generate mask.png 'a white square on a black background'
curl --fail-with-body --silent --show-error "$server/inpaint_and_upload_image" \
  -F "prompt=a yellow square on a blue background" -F "image_file=@picture.png" -F "mask_file=@mask.png" \
  -F "feather=4" -F "format=png"
echo
