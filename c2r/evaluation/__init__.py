"""Evaluation of a training run by itself: validation, samples and their CG look.

`c2r.metrics` has the measures of generated videos; `c2r.scoring` runs them, and these, on finished models.
"""
