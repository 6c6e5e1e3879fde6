"""Explorers: controls over a live picture, one file a study, and the still figures that say the same."""
