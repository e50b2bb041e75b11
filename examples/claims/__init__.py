"""Claims of the papers on low-rank adaptation, tried on real models: `../reproduce.py` runs them.

A claim is a module with a function ``run(lab) -> Report``. What is learned is in `tasks`, which
parameters are trained in `arms`, one training run in `training`, and `lab` keeps the result of each
run, so that one that is there is not made again.
"""
