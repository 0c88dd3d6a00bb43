"""Trains AltDiffusion-mini from nothing, on images that the package draws itself.

``stages`` has the recipe's numbers, ``parts`` carries it out, ``loop`` trains any stage; the other modules are the
tokenizer, and the losses of one part each.
"""
