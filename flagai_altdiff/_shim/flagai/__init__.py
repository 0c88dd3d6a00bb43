"""FlagAI's import names for flagai_altdiff: text-to-image and AltCLIP only."""
