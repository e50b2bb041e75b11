"""What a user can ask of adapted weights: how they are used, and how much of them is trained."""
