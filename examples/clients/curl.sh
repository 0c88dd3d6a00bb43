#!/bin/sh
# Images with curl. Start a server with `altdiff serve` first; ALTDIFF_URL and ALTDIFF_API_KEY say where it is and what
# its key is.
set -eu
url=${ALTDIFF_URL:-http://127.0.0.1:7860}
ask() { curl -sSf ${ALTDIFF_API_KEY:+-H "Authorization: Bearer $ALTDIFF_API_KEY"} "$@"; }

# OpenAI's interface, with options of ours; the answer names the picture
picture=$(ask "$url/v1/images/generations" -H 'Content-Type: application/json' \
    -d '{"prompt": "gato, fondo amarillo", "seed": 7, "steps": 12, "response_format": "url"}' |
    sed 's/.*"url":"\([^"]*\)".*/\1/')
ask -o cat.png "$picture"

# the same picture as a beginning
ask "$url/v1/images/edits" -F image=@cat.png -F prompt="tiger, green background" -F strength=0.7 \
    -F response_format=url -o edited.json

# a job, watched until it is done
job=$(ask "$url/api/jobs" -d '{"prompt": "Ananas, blauer Hintergrund", "steps": 12}' | sed 's/^{"id":"\([^"]*\)".*/\1/')
ask -N "$url/api/jobs/$job/events" | grep '^event: '
ask -o pineapple.webp "$url/api/jobs/$job/images/0?format=webp"
