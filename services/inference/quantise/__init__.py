"""Makes a model folder of quantised blocks, and says what it costs.

Owns the command `python -m services.inference.quantise` (`__main__`, which `llmos quantize` runs), what is
written and how (`folder`), what the result still knows of a text (`precision`, `comparison`), and how it is
told (`report`). Does not own what blocks mean (`engine.model.blocks`) nor who computes with them
(`engine.native`).
"""
