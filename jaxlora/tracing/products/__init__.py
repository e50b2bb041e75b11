"""The low-rank term of a product with an adapted weight, and the forms of computing it."""
