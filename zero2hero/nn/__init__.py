"""Floor 1, the parts that every model of the road is made of.

Shapes are written into names everywhere: B batch, T time (queries), S time (keys), D model width, H query
heads, G key/value heads, K head width, F feed-forward width, V vocabulary.
"""
