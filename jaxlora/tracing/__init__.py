"""The transform: trace a program, follow weights through it, evaluate it with low-rank weights.

Only this folder knows jaxprs. From the bottom up: `jaxprs` reads programs, `values` are what an
evaluation computes with beside arrays, `products` adds the low-rank term to a product, `rules` has
one function for each primitive.
"""
