"""Theory of attention: the mechanism that each paper defines, and its numeric statement as the claim."""
