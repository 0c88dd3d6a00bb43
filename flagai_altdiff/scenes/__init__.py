"""The world of AltDiffusion-mini: drawn scenes, captions in 18 languages, and the classifier that judges pictures."""
