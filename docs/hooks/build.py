"""What mkdocs does beside Markdown: drawn pages, API pages, names that must exist, formulas.

* A page with ``drawn: true`` in its front matter is a Jinja template over the functions of
  ``results`` and ``reference``.
* Each package of ``sleeprl`` gets a page below ``reference/api``.
* A setting in backticks becomes a link to the configuration page, a file a check that it exists; a name
  that does not exist ends a strict build.
* A fenced block of the language ``math`` is typeset at build time, so no page loads a script for it.
"""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path
from typing import Any

import jinja2
import reference
import results
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
API = "reference/api"
SECTIONS = {name.partition(".")[0] for name in reference.setting_names() if "." in name}
PLACES = ("sleeprl", "tests", "examples", "benchmarks", "cluster", "docs", "tools", "tuning")
_CODE = re.compile(r"(?<!`)(\[?)`([^`\n]+)`(?!`)")
_SETTING = re.compile(r"^([a-z_]+(?:\.[a-z_]+)+)(=[^=]*)?$")
_FILE = re.compile(rf"^(?:{'|'.join(PLACES)})/[\w./-]+$")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Typeset formulas, and list the API's pages in the navigation."""
    fence = {"name": "math", "class": "math", "format": typeset}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    pages = [{f"sleeprl.{name}": f"{API}/{name}.md"} for name in packages()]
    for entry in config.nav or []:
        for title, children in entry.items():
            if title == "Reference":
                children.append({"API": [{"Overview": f"{API}/index.md"}, *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API and the pictures that benchmarks draw."""
    for name in packages():
        files.append(File.generated(config, f"{API}/{name}.md", content=api_page(name)))
    files.append(File.generated(config, f"{API}/index.md", content=api_index()))
    files.append(File.generated(config, "layers.svg", content=layers_picture()))
    for picture in sorted(results.RESULTS.glob("*.svg")):
        target = f"results/{picture.name}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw what is drawn, then make links of settings."""
    where = page.file.src_uri
    if page.meta.get("drawn"):
        functions = {**results.FUNCTIONS, **reference.FUNCTIONS}
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        try:
            markdown = environment.from_string(markdown).render(**functions)
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise PluginError(f"{where}: {error!r}") from error
    return linked(markdown, where)


# --- names that must exist ---------------------------------------------------------------------------


def linked(markdown: str, where: str) -> str:
    """Link settings and check files, outside of fenced blocks.

    Raises:
        PluginError: A setting or a file that the text names does not exist.
    """
    lines, fenced = [], False
    for line in markdown.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        lines.append(line if fenced else _CODE.sub(lambda m: _link(m, where), line))
    return "\n".join(lines)


def _link(match: re.Match[str], where: str) -> str:
    bracket, text = match.groups()
    if _FILE.match(text) and not (ROOT / text).exists():
        raise PluginError(f"{where}: there is no file {text!r} in the repository")
    setting = _SETTING.match(text)
    is_file = text.endswith((".py", ".json", ".jsonl", ".md", ".yaml", ".gradients"))
    if bracket or is_file or not setting or setting[1].partition(".")[0] not in SECTIONS:
        return match[0]
    key, known = setting[1], reference.setting_names()
    if any(name.startswith(f"{key}.") for name in known):  # a section
        return match[0]
    if key not in known and key in reference.summary_keys():
        return match[0]
    while key not in known:  # keys of one's own below an open setting, such as options of a reward
        key = key.rpartition(".")[0]
        if not key:
            raise PluginError(f"{where}: there is no setting {setting[1]!r}")
    return f"[`{text}`][{key}]"


# --- API ---------------------------------------------------------------------------------------------


def packages() -> list[str]:
    """Packages of sleepRL, as they lie below ``sleeprl``."""
    return sorted(path.parent.name for path in (ROOT / "sleeprl").glob("*/__init__.py"))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def api_page(name: str) -> str:
    """One package: what it is, and all of its modules."""
    folder = ROOT / "sleeprl" / name
    parts = [f"# sleeprl.{name}", summary(folder / "__init__.py")]
    for path in sorted(folder.rglob("*.py")):
        if path.name == "__init__.py" and len(path.read_text().splitlines()) < 8:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        parts.append(f"::: {module}")
    return "\n\n".join(parts)


def api_index() -> str:
    """All packages with what they are, and the public API."""
    rows = [
        [f"[`sleeprl.{name}`]({name}.md)", summary(ROOT / "sleeprl" / name / "__init__.py")]
        for name in packages()
    ]
    return "\n\n".join(
        [
            "# API",
            "The names in `sleeprl.__all__` are public and follow semantic versioning. Everything else may "
            "move between releases; a package's page says what it holds.",
            "::: sleeprl",
            "## Packages",
            results.table(["package", ""], rows),
        ]
    )


# --- formulas ----------------------------------------------------------------------------------------


def typeset(
    source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any
) -> str:
    """Turn each line of a fenced block into a picture in the text's own colour."""
    return "".join(
        f'<p class="{css_class}">{picture(line)}</p>' for line in source.splitlines() if line
    )


def layers_picture() -> str:
    """The storeys that tests/unit/test_layering.py holds, the highest at the top, as SVG."""
    tree = ast.parse((ROOT / "tests" / "unit" / "test_layering.py").read_text())
    storeys = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STOREYS"
    )
    step, width = 46, 900
    height = step * len(storeys) + 32
    rows = []
    for place, names in enumerate(reversed(storeys)):
        y = 20 + place * step
        label = "   ·   ".join(sorted(name for name in names if not name.startswith("__")))
        rows.append(
            f'<rect x="20" y="{y}" width="800" height="36" rx="8" fill="#3f51b5" '
            f'fill-opacity="{0.10 + 0.04 * place:.2f}" stroke="#7986cb"/>'
            f'<text x="420" y="{y + 23}" text-anchor="middle">{label or "sleeprl"}</text>'
        )
    arrow = (
        f'<path d="M850 {24}V{height - 30}" stroke="#7986cb" stroke-width="2"/>'
        f'<path d="M844 {height - 36}h12l-6 12z" fill="#7986cb"/>'
        f'<text transform="translate(880 {height / 2}) rotate(-90)" text-anchor="middle">'
        "imports go down only</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        "<title>The layers of sleepRL</title><style>text { font: 15px -apple-system, "
        "'Segoe UI', Arial, sans-serif; fill: #5c6bc0; }</style>"
        f"{''.join(rows)}{arrow}</svg>"
    )


def picture(formula: str) -> str:
    """One formula as inline SVG."""
    target = io.BytesIO()
    font = FontProperties(size=12, math_fontfamily="cm")
    mathtext.math_to_image(f"${formula}$", target, prop=font, format="svg")
    svg = target.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, flags=re.DOTALL)  # its white ground
    label = formula.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" fill="currentColor" ', 1)
