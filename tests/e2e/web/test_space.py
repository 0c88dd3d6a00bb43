"""What a Hugging Face Space needs, started here as it is there."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests
import yaml

SPACE = Path(__file__).parents[3] / "examples" / "space"


def test_a_space_starts_and_draws(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**script_environment, "GRADIO_SERVER_PORT": str(port), "SPACE_HOST": "me-altdiffusion.hf.space"}
    process = subprocess.Popen([sys.executable, str(SPACE / "app.py")], cwd=tmp_path, env=environment)
    try:
        url, named = f"http://127.0.0.1:{port}", {"Host": "me-altdiffusion.hf.space"}
        deadline = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"{url}/readyz", timeout=5).ok:
                    break
            except requests.ConnectionError:
                pass
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert "AltDiffusion" in requests.get(url, headers=named, timeout=20).text
        body = {"prompt": "a red heart", "steps": 2}
        answer = requests.post(f"{url}/v1/images/generations", json=body, headers=named, timeout=60)
        assert answer.json()["data"][0]["b64_json"]
    finally:
        process.terminate()
        process.wait(60)


def test_the_front_matter_is_complete() -> None:
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])  # type: ignore[index]
    assert (SPACE / found["app_file"]).is_file() and found["sdk"] == "gradio"
    pinned = (SPACE.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={found['sdk_version']}\n" in pinned
    assert (SPACE / "requirements.txt").read_text().split() == ["flagai_altdiff[web]"]
