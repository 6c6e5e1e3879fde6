"""Studies 1 and 2: walks on word graphs, and what a model makes of them."""
