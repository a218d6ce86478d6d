"""The stages in which the toy's base models are trained."""
