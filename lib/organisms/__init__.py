"""Training of the embedded models, one file a model: `python -m lib organisms NAME`."""
