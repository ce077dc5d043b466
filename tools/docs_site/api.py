"""Pages of the API: which modules and names each documents; mkdocstrings reads their docstrings."""

from collections.abc import Sequence
from pathlib import Path

from docs_site.papers import ROOT, papers

#: Pages, their titles, and what stands on them: packages (all modules inside), modules, or names.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tessellar": (
        "Loading and sampling",
        (
            "tessellar.load",
            "tessellar.load_generator",
            "tessellar.load_tokenizer",
            "tessellar.pipeline.ImageGenerator",
            "tessellar.sampling.settings.Sampling",
            "tessellar.errors",
        ),
    ),
    "protocol": ("Protocol", ("tessellar.protocol",)),
    "sampling": ("Decoding", ("tessellar.sampling",)),
    "processes": ("Flow and diffusion", ("tessellar.processes",)),
    "quantizers": ("Quantizers", ("tessellar.tokenizers.quantizers",)),
    "losses": ("Losses of tokenizers", ("tessellar.tokenizers.losses",)),
    "data": ("Data", ("tessellar.data.sets", "tessellar.data.tars", "tessellar.data.token_cache")),
    "training": ("Training", ("tessellar.training", "tessellar.training.methods")),
    "callbacks": ("Callbacks", ("tessellar.callbacks",)),
    "measures": ("Measures", ("tessellar.measures",)),
    "checkpoints": ("Checkpoints and exports", ("tessellar.checkpoints",)),
}


def modules_in(name: str) -> list[str]:
    """The modules of a package, or the name itself where it is none."""
    folder = ROOT / Path(*name.split("."))
    if not folder.is_dir():
        return [name]
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    return [f"{name}.{file.stem}" for file in files]


def page(title: str, names: Sequence[str]) -> str:
    """A page that documents some names."""
    lines = [f"# {title}", ""]
    for name in names:
        for module in modules_in(name):
            lines += [f"::: {module}", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """All pages of the API by their names: the shared rooms, then the folders of the papers."""
    made = {name: page(title, names) for name, (title, names) in PAGES.items()}
    for paper in papers():
        for package in paper.packages:
            names = [f"{package.module}.{offer}" for offer in package.entry.offers]
            title = f"{paper.title}: {package.folder.as_posix()}"
            made[f"{package.folder.parts[0]}_{package.name}"] = page(title, names)
    return made


def index() -> str:
    """The list of the API's pages."""
    lines = ["# API", "", "Made from the docstrings.", ""]
    lines += [f"- [{title}]({name}.md)" for name, (title, _) in PAGES.items()]
    lines += ["", "Classes and presets of the papers:", ""]
    for paper in papers():
        links = [
            f"[`{p.folder.as_posix()}`]({p.folder.parts[0]}_{p.name}.md)" for p in paper.packages
        ]
        lines.append(f"- {paper.title}: {', '.join(links)}")
    return "\n".join(lines) + "\n"
