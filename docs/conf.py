"""Configuration of the documentation, which `make docs` builds; every warning is an error there.

The source folder is the whole checkout, so that pages have the links they have in a checkout: README.md, the model
cards and the notes of the kernels are pages themselves, and what else they link to, such as records, is downloaded.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import generate

project = "vssm"
author = "the authors of vssm"
version = release = version_of("vssm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/**.md", "kernels/README.md", "model_cards/*.md"]
# Folders are named for their subfolders, too, for Sphinx looks for files in all others.
exclude_patterns = [".*", "build", "dist", "docs/_build", "output", "tests", "**/__pycache__"]
root_doc = "docs/index"

default_role = "py:obj"  # what docstrings say in single backticks
highlight_language = "none"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "References")]
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "vssm"
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_extra_path = ["root"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}


def skip_field(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leaves out the fields of named tuples, which the docstring of the class describes."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Has the generated pages written before Sphinx looks for pages."""
    app.connect("builder-inited", lambda app: generate.write_pages(Path(app.srcdir)))
    app.connect("autodoc-skip-member", skip_field)
