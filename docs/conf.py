"""Settings of Sphinx for these pages.

The links to JAX, Flax and Optax need a network: they are made where ``DOCS_INTERSPHINX`` is set.
"""

import os
import sys
from pathlib import Path

import jaxlora

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "extensions"))

project = "jaxlora"
author = "the jaxlora authors"
copyright = "the jaxlora authors"
version = release = jaxlora.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "benchmark_bars",
    "linked_names",
    "mathml",
    "short_signatures",
]
exclude_patterns = ["_build", "README.md"]
default_role = "py:obj"  # a name in single backquotes, as in the docstrings
nitpicky = True
# names of other projects resolve only with intersphinx
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jnp|np|numpy|optax|flax|nn|nnx|orbax|qwix|etils)\..*"),
    ("py:.*", r"(collections|os|pathlib|re|typing|weakref)\..*"),
    ("py:class", "Axes"),  # of matplotlib, which the pictures import when they are drawn
    ("py:class", r"(.*\.)?[A-Z]"),  # type variables
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 72

intersphinx_mapping = {}
if "DOCS_INTERSPHINX" in os.environ:
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "sphinx_book_theme"
html_title = "jaxlora"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "secondary_sidebar_items": {  # elsewhere, code and tables have the room
        "api/*": ["page-toc"],
        "*": [],
        "guides/*": [],
        "coming_from/*": [],
    },
    "home_page_in_toc": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
