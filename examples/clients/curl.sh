#!/bin/sh
# Images with curl. Start a server with `altdiff serve` first; ALTDIFF_URL says where it is.
set -eu
url=${ALTDIFF_URL:-http://127.0.0.1:7860}

# OpenAI's interface, with options of ours; the answer names the picture
picture=$(curl -sf "$url/v1/images/generations" -H 'Content-Type: application/json' \
    -d '{"prompt": "gato, fondo amarillo", "seed": 7, "steps": 12, "response_format": "url"}' |
    sed 's/.*"url":"\([^"]*\)".*/\1/')
curl -sf -o cat.png "$picture"

# the same picture as a beginning
curl -sf "$url/v1/images/edits" -F image=@cat.png -F prompt="tiger, green background" -F strength=0.7 \
    -F response_format=url -o edited.json

# a job, watched until it is done
job=$(curl -sf "$url/api/jobs" -d '{"prompt": "Ananas, blauer Hintergrund", "steps": 12}' | sed 's/^{"id":"\([^"]*\)".*/\1/')
curl -sfN "$url/api/jobs/$job/events" | grep '^event: '
curl -sf -o pineapple.webp "$url/api/jobs/$job/images/0?format=webp"
