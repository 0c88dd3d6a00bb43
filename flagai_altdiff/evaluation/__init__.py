"""The paper's protocol: images of a model in every language, measured; and what AltCLIP finds again.

What is measured, how the work is split among processes, and which weights it takes: ``docs/evaluation.md``.
"""
