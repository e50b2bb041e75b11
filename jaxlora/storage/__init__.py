"""Checkpoints with Orbax, and how other writers take adapted weights.

In a program of several processes each of them calls every function here, with one path on a file
system that they share. Each writes and reads its own part of the arrays, the first alone renames
and removes, and what goes wrong in one is raised in all.
"""
