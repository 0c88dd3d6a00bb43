"""Trains AltDiffusion-mini from nothing, on images that the package draws itself.

``stages`` has the recipe's numbers, ``parts`` carries it out on the engine of ``training``, ``steps`` is what that asks
of a stage; the other modules are the tokenizer, and the samples and losses of one part each.
"""
