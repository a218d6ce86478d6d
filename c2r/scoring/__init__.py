"""Parts of `c2r.evaluate`: scenes, their measures, losses of a model, statistics, picture and page."""
