"""Studies 1 and 2: walks on a graph of words, heads, word means and who writes them."""
