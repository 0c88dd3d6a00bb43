"""Images through OpenAI's Python client: pip install openai.

Start a server with ``altdiff serve`` first; ALTDIFF_URL and ALTDIFF_API_KEY say where it is and what its key is.
"""

import base64
import os
from pathlib import Path

from openai import OpenAI

url = os.environ.get("ALTDIFF_URL", "http://127.0.0.1:7860")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("ALTDIFF_API_KEY", "none"))

answer = client.images.generate(
    prompt="熊猫，红色背景",
    n=2,
    response_format="b64_json",
    extra_body={"seed": 7, "steps": 12, "negative_prompt": "small"},  # our own options
)
for number, image in enumerate(answer.data or []):
    Path(f"openai-{number}.png").write_bytes(base64.b64decode(image.b64_json or ""))

with client.images.generate(prompt="rocket, blue background", stream=True, partial_images=2) as events:
    for event in events:
        name = "rocket.png"
        if event.type == "image_generation.partial_image":
            name = f"rocket-{event.partial_image_index}.jpg"
        Path(name).write_bytes(base64.b64decode(event.b64_json))
        print(event.type, name)

edited = client.images.edit(
    image=Path("rocket.png"),
    prompt="balloon, blue background",
    response_format="b64_json",
    extra_body={"strength": 0.8},
)
Path("edited.png").write_bytes(base64.b64decode((edited.data or [])[0].b64_json or ""))
