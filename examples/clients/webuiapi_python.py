"""Images through webuiapi, a client for A1111's interface: pip install webuiapi.

Start a server with ``altdiff serve`` first; ALTDIFF_URL and ALTDIFF_API_KEY say where it is and what its key is.
"""

import os
from urllib.parse import urlsplit

import webuiapi

url = urlsplit(os.environ.get("ALTDIFF_URL", "http://127.0.0.1:7860"))
key = os.environ.get("ALTDIFF_API_KEY")
api = webuiapi.WebUIApi(host=url.hostname, port=url.port, username="any", password=key)

drawn = api.txt2img(
    prompt="Roboter, (grüner Hintergrund:1.2)",
    seed=3,
    steps=12,
    cfg_scale=2,
    width=128,
    height=128,
    sampler_name="Euler",
)
drawn.image.save("robot.png")
print(drawn.info["infotexts"][0])

near = api.img2img(
    images=[drawn.image],
    prompt="Roboter, roter Hintergrund",
    seed=4,
    steps=12,
    cfg_scale=2,
    width=128,
    height=128,
    denoising_strength=0.7,
    sampler_name="DPM++ 2M Karras",
)
near.image.save("red-robot.png")
