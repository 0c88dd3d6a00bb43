"""AltDiffusion-mini, the embedded model: the world that it draws, how well it does, and how it was trained.

``world`` says what a scene is, ``vocabulary`` and ``captions`` put it into words, ``drawing`` draws it: none of these
needs torch. ``judge`` tells what an image shows, ``accuracy`` and ``contact_sheet`` measure and show the model,
``recipe`` trains it from nothing.
"""
