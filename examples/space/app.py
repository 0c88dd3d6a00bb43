"""The page as a Hugging Face Space: the server at the address and port that a Space expects."""

import os
import sys

from flagai_altdiff.cli import main

if __name__ == "__main__":
    # A Space stands behind a proxy of its own, under a name of its own, and is there for everybody.
    words = ["serve", "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860"), "--open"]
    words += ["--models", os.environ.get("ALTDIFF_MODELS", "AltDiffusion-mini")]
    host = os.environ.get("SPACE_HOST")
    words += ["--allow-host", host] if host else []
    sys.exit(main([*words, "--max-waiting", "32", "--max-waiting-each", "4", "--max-work", "5e8"]))
