"""Parts of `c2r.evaluate`: scenes, videos, their measures, losses of finished models, statistics, picture and page.

`c2r.metrics` has the measures of a video themselves; `c2r.evaluation` is what a training run evaluates of itself.
"""
