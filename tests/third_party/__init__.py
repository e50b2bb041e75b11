"""Models of other libraries, unmodified, for the laws of `test_laws`.

Each `models_<library>.py` is skipped where its library is not installed (``third-party`` in
pyproject.toml lists them). A new model is one function there, marked with `model`.
"""
