"""How Sphinx builds the documentation: `make docs`."""

import inspect
import re

import netdeconv_jax

project = "netdeconv_jax"
copyright = "the authors of netdeconv_jax"
release = version = netdeconv_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "netdeconv_jax"
html_copy_source = html_show_sourcelink = False
myst_heading_anchors = 3
suppress_warnings = [
    "myst.xref_missing"
]  # README links to files that are no pages, such as CITATION.cff

autodoc_typehints = "none"  # shapes and meanings are in the text, types in the source
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Source", "Example")
ENTRIES, ENTRY = ("Args", "Attributes", "Raises"), "entry: "
CODE = re.compile(r"(`[^`]+`)(\w?)")
NAMELESS = {
    r"<class 'jax.numpy.(\w+)'>": r"jnp.\1",
    r"<function (\w+)(?:\.<locals>\.\w+)?(?: at \w+)?>": r"\1",
    r"mappingproxy\((.*?)\)": r"\1",
    r", (?:parent|name)=[^,)]*(?=[,)])": "",
}


def docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring, which is plain text in the manner of STYLE, into reStructuredText, in place."""
    del app, what, name, obj, options
    result: list[str] = []
    section = ""
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if indent == 0 and text[:-1] in SECTIONS and text.endswith(":"):
            section = text[:-1]
            result += ["", f".. rubric:: {section}", ""]
        elif section == "Example":
            result.append(line.removeprefix("  "))
        elif text.startswith("|"):  # a table stays as it is
            result += [] if result[-1].startswith("    |") else ["::", ""]
            result.append("    " + line)
        elif section in ENTRIES and text:
            if indent == 2:
                result.append(ENTRY + text)
            elif ": " in result[-1].removeprefix(ENTRY) or not result[-1].startswith(ENTRY):
                result.append("    " + text)
            else:  # the names go on
                result[-1] += " " + text
        else:
            if indent == 0:
                section = ""
                source = text.startswith("Source: ")
                result += [""] if source else []
            result.append(text if section else line)
    lines[:] = [part for line in result for part in _entry(line)]


def _entry(line: str) -> list[str]:
    """Return a line as reStructuredText, one that names something and tells of it as a definition."""
    if line.startswith((">>>", "...", "    |")):
        return [line]
    if not line.startswith(ENTRY):
        return [_plain(line)]
    names, _, text = line.removeprefix(ENTRY).partition(": ")
    return ["", ", ".join(f"**{name}**" for name in names.split(", ")), "    " + _plain(text)]


def _plain(text: str) -> str:
    parts = CODE.split(text)
    for i in range(0, len(parts), 3):
        parts[i] = re.sub(r"([*|]|_(?=\W))", r"\\\1", parts[i])
    for i in range(1, len(parts), 3):
        parts[i] = f"`{parts[i]}`" + (r"\ " if parts[i + 1] else "")
    return "".join(parts)


def signature(app, what, name, obj, options, args, returned):
    """Name defaults as one would write them, and show what the constructors of NNX take."""
    del app, name, options
    if what == "class" and args == "(*args, **kwargs)":
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        args = str(inspect.Signature(plain))
    for pattern, text in NAMELESS.items():
        args = args and re.sub(pattern, text, args)
    return args, returned


def setup(app) -> None:
    """Connect both."""
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
