"""Hundreds of real things: their pictures in three styles, and their names in the 18 languages, written by people.

``packages`` fetches both, ``catalogue`` says which things there are and what they are called, ``sprites`` are the
pictures, ``composing`` puts one on a ground, ``phrases`` says so in words, ``shards`` writes it all as training data.
"""
