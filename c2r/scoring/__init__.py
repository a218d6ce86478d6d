"""What `c2r.evaluate` is made of: scenes, their measures, losses of a model, statistics, picture and page."""
