"""Trains AltDiffusion-mini from nothing, on pictures that the package draws itself."""
