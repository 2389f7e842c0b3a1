"""Graph to graph: the pass contract, rewriting, and the passes; `pipeline` lists them in order."""
