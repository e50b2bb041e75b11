"""Linear algebra on the matrices of weights: decompositions, and weights as stacks of matrices."""
