"""What an adapted weight is, where its arrays are, and how the leaves of a tree are named."""
