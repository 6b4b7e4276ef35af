"""Linear attention: kernelised maps, decays, states, and what is built around them."""
