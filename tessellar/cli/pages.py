"""`--help` of every command in at most two screens, made from the sources without importing them.

A command's options are the arguments of its function and their lines in its docstring; `--help all`
gives the parser's own page, with every option of every class.
"""

import ast
import textwrap
from collections.abc import Iterable, Sequence

from tessellar.cli.catalogue import (
    FOLDERS,
    PACKAGE,
    definition,
    entries,
    first_sentence,
    imported,
    parsed,
)
from tessellar.cli.spelling import spelled

WIDTH = 100
COLUMN = 18
PLAIN = (
    "str",
    "int",
    "float",
    "bool",
    "list",
    "dict",
    "tuple",
    "Literal",
    "Metric",
    "Purpose",
    "ImageDataModule",
)
EXAMPLES = {
    "train": (
        "--config demo/tokenizer",
        "--config own_images/tokenizer --name mine --data.root PICTURES",
        "--config demo/tokenizer --resume auto",
        "validate --config demo/tokenizer --resume auto",
    ),
    "sample": (
        "runs/demo-generator/export --classes circle,3 --per-class 8 --guidance.scale 2",
        "runs/t2i/export --prompts prompts.txt --out outputs/prompts",
        "runs/demo-generator/export --algorithm SpeculativeJacobi --algorithm.window 16",
        "runs/demo-generator/export --search Beam --search.width 4",
        "runs/demo-generator/export --image X.png --mask M.png --classes star",
    ),
    "evaluate": (
        "model runs/demo-generator/export --extractor NET.safetensors --count 1000",
        "samples outputs/samples --reference REF.npz",
        "stats FOLDER --size 256 --out REF.npz",
    ),
    "convert": (
        "import llamagen c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --out llamagen-b",
        "cache runs/mine/export --data ImageFolderData --data.root PICTURES --out mine",
        "info runs/mine/export",
    ),
    "data": (
        "imagenet ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar --labels DEVKIT.tar.gz --out imagenet",
    ),
    "demo": (
        "runs/demo-generator/export --guidance.scale 2",
        "runs/demo-generator/export --other runs/t2/export",
    ),
    "serve": (
        "runs/demo-generator/export --guidance.scale 2",
        "runs/demo-generator/export --port 9000 --batch-size 64 --wait 0.02",
    ),
    "push": (
        "runs/demo-generator/export OWNER/NAME --license cc-by-4.0",
        "runs/demo-generator/export OWNER/NAME --license cc-by-4.0 --yes",
    ),
    "sweep": (
        "--config demo/generator --optimizer.lr 3e-4 1e-3 3e-3 --data.batch_size 16 32",
        "--config demo/tokenizer --optimizer.lr 1e-3 4e-3 --metric val/psnr --mode max",
    ),
    "report": (
        "runs/demo-generator",
        "runs/small runs/large --out outputs/small-and-large.html",
    ),
}


def page(command: str, argv: Sequence[str]) -> str | None:
    """The help that `argv` of a command asks for; None where it asks for none, or for all of it."""
    asked = _help_in(argv)
    if asked is None or list(argv[asked + 1 : asked + 2]) == ["all"]:
        return None
    if command == "train":
        return _train()
    if _table_of(command) is None:
        return _function(command, command, command)
    functions = functions_of(command)
    name = next((word for word in argv[:asked] if not word.startswith("-")), None)
    if name not in functions:
        return page_of_commands(command, functions)
    module, function = functions[name]
    return _function(command, module, function, name)


def wants_all(argv: Sequence[str]) -> list[str]:
    """`argv` with `--help all` as parsers know it."""
    words = list(argv)
    asked = _help_in(words)
    if asked is not None and words[asked + 1 : asked + 2] == ["all"]:
        del words[asked + 1]
    return words


def _help_in(argv: Sequence[str]) -> int | None:
    """Where help is asked for first."""
    return next((place for place, word in enumerate(argv) if word in ("-h", "--help")), None)


def _train() -> str:
    usage = f"usage: {spelled('train')} [fit | validate] --config CONFIG [options]"
    what = (
        "Train a tokenizer or a generator as a YAML says. All that a run writes lies in "
        "runs/NAME: checkpoints, metrics.csv, pictures, log.txt and the export."
    )
    options = [("--config CONFIG", "a YAML, or the name of one of ours; several add up")]
    options += own_options()
    options += [
        ("--dry_run [GPU]", "try two updates on noise: parameters, memory, time, hours on a GPU"),
        ("--print_config", "the whole config with its defaults"),
        ("--help all", "every option; --model.help CLASS and --data.help CLASS: those of a class"),
    ]
    keys = (
        "Every key of a YAML is an option: --trainer.max_steps 500 --data.batch_size 32 "
        "--model.optimizer.lr 0.001 --data.root FOLDER"
    )
    sections = [usage, _wrapped(what), _table(options), _wrapped(keys), _choices()]
    return "\n\n".join([*sections, _examples("train")])


def own_options() -> list[tuple[str, str]]:
    """The options that our training command adds to the keys of a config."""
    found = []
    for node in ast.walk(parsed(PACKAGE / "cli" / "train.py")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument":
            for keyword in node.keywords:
                if keyword.arg == "help" and isinstance(node.args[0], ast.Constant):
                    found.append((str(node.args[0].value), ast.literal_eval(keyword.value)))
    return found


def _choices() -> str:
    """Names of systems and data sets, a line or two each."""
    lines = [
        _names_of("tokenizers", "tokenizers"),
        _names_of("generators", "generators"),
        _names_of("data sets", "data"),
    ]
    configs = entries("configs")
    folders = sorted({entry.name.partition("/")[0] for entry in configs})
    lines.append(_hanging("configs:", f"{len(configs)} in {', '.join(folders)}"))
    lines.append(_hanging("more:", "tessellar list KIND [PATTERN], tessellar show NAME"))
    return "\n".join(lines)


def _table_of(command: str) -> ast.expr | None:
    """The table COMMANDS in a command's module, where it has several."""
    for node in parsed(PACKAGE / "cli" / f"{command}.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return node.value
    return None


def functions_of(command: str) -> dict[str, tuple[str, str]]:
    """Commands of `evaluate` or `convert`: name to module of `tessellar.cli` and function."""
    tree = parsed(PACKAGE / "cli" / f"{command}.py")
    homes = {}
    for here, module, name in imported(tree):
        homes[here] = (module.rpartition(".")[2], name)
    table = _table_of(command)
    assert isinstance(table, ast.Dict)
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant)
        if isinstance(value, ast.Call):  # Elsewhere(module, name)
            module, name = map(ast.literal_eval, value.args)
            found[str(key.value)] = (module.rpartition(".")[2], name)
        else:
            name = ast.unparse(value)
            found[str(key.value)] = homes.get(name, (command, name))
    return found


def page_of_commands(command: str, functions: dict[str, tuple[str, str]]) -> str:
    """All commands of `evaluate` or `convert` with a line each."""
    rows = []
    for name, (module, function) in functions.items():
        rows.append((name, first_sentence(_definition(module, function))))
    usage = f"usage: {spelled(command)} COMMAND ... (COMMAND --help lists its options)"
    said = first_sentence(parsed(PACKAGE / "cli" / f"{command}.py")).partition(": ")[2]
    what = _wrapped(said[:1].upper() + said[1:])
    return "\n\n".join([usage, what, _table(rows), _choices(), _examples(command)])


def _function(command: str, module: str, function: str, name: str = "") -> str:
    """The page of one function."""
    node = _definition(module, function)
    docstring = ast.get_docstring(node) or ""
    said = argument_lines(docstring)
    count = len(node.args.args) - len(node.args.defaults)
    usage = " ".join(filter(None, ["usage:", spelled(command), name]))
    rows = []
    for argument in node.args.args[:count]:
        needed = argument.arg.upper()
        rows.append((needed, said.get(argument.arg, "")))
        usage += f" {needed}"
    for argument, default in zip(node.args.args[count:], node.args.defaults, strict=True):
        line = option_line(argument, default, said.get(argument.arg, ""))
        rows.append((_option(argument.arg), line))
    what = _wrapped(" ".join(docstring.partition("\n\nArgs:")[0].split()))
    sections = [f"{usage} [options]", what, _table(rows)]
    sections += names_for([argument.arg for argument in node.args.args])
    start = f"{name} " if name else ""
    shown = [each for each in EXAMPLES.get(command, ()) if each.startswith(start)]
    if shown:
        sections.append(_examples(command, shown))
    return "\n\n".join(sections)


def names_for(arguments: Sequence[str]) -> list[str]:
    """What the arguments of a command choose among: data sets, algorithms, whose weights."""
    lines = []
    if "system" in arguments and "file" in arguments:
        systems = set()
        for kind in FOLDERS:
            for entry in entries(kind):
                if (entry.file.parent / "official.py").is_file():
                    systems.add(entry.name)
        lines.append(_hanging("systems:", ", ".join(sorted(systems))))
    if "data" in arguments:
        lines.append(_names_of("data sets", "data"))
    if "algorithm" in arguments:
        lines.append(_names_of("algorithms", "algorithms"))
    return ["\n".join(lines)] if lines else []


def _names_of(title: str, kind: str) -> str:
    names = ", ".join(entry.name for entry in entries(kind))
    return _hanging(f"{title}:", names)


def _definition(module: str, function: str) -> ast.FunctionDef:
    node = definition(PACKAGE / "cli" / f"{module}.py", function)
    assert isinstance(node, ast.FunctionDef)
    return node


def argument_lines(docstring: str) -> dict[str, str]:
    """The lines of `Args:`, by argument."""
    said: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:\n")[2].splitlines():
        depth = len(line) - len(line.lstrip())
        if depth == 4:
            name, _, text = line.strip().partition(": ")
            said[name] = text
        elif name:
            said[name] += f" {line.strip()}"
    return said


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def option_line(argument: ast.arg, default: ast.expr, said: str) -> str:
    """An option's line, with its default where the line does not say it, and how to ask for more."""
    annotation = ast.unparse(argument.annotation) if argument.annotation else "str"
    kind = annotation.partition("[")[0].partition(" ")[0]
    if kind not in PLAIN:
        return f"{said} ({_option(argument.arg)}.help)" if ".help" not in said else said
    value = default.value if isinstance(default, ast.Constant) else None
    if kind == "bool" and value is True:
        return f"{said} (--no-{argument.arg.replace('_', '-')} turns it off)"
    if value in (None, "", False) or "default" in said:
        return said
    return f"{said} (default {value})"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(_hanging(f"  {name}", text) for name, text in rows)


def _hanging(head: str, text: str) -> str:
    start = f"{head:<{COLUMN}} "
    return textwrap.fill(
        start + text, WIDTH, subsequent_indent=" " * (COLUMN + 1), break_on_hyphens=False
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _examples(command: str, shown: Sequence[str] | None = None) -> str:
    lines = ["examples:"]
    for line in EXAMPLES[command] if shown is None else shown:
        lines.append(f"  {spelled(command)} {line}")
    return "\n".join(lines)
