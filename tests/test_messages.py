"""What users read: one line, plain words. All messages of the sources are looked at, without running them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAID = {"UserError", "log.info", "log.warning", "log.error", "print"}
LONGEST = 330
JARGON = (
    r"subcommand|subclass|namespace|kwargs|args\b|instantiat\w*|NestedArg|jsonargparse|LightningModule|LightningCLI|"
    r"global_step|state_dict|dataloader|DataLoader|stdout|stderr|argv|callable|NoneType|unicode|mmap|"
    r"rank \d|tensorboard_logger|nn\.Module|dtype mismatch|enum|boolean|TODO|FIXME|oops|please|sorry"
)


def text_of(node: ast.expr) -> str:
    """A message with a placeholder for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "X"


def messages(said: set[str] = SAID) -> Iterator[tuple[str, str]]:
    """Place and text of what our sources say: arguments of the calls `said`, and help of options."""
    files = [
        path
        for folder in ("tessellar", "tokenizers", "models")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in said and node.args:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text_of(node.args[0])
            if isinstance(node, ast.keyword) and node.arg == "help":
                yield f"{path.relative_to(ROOT)}:{node.value.lineno}", text_of(node.value)


def test_messages_are_one_line_in_plain_words() -> None:
    found = list(messages())
    assert len(found) > 500
    pages = {place for place, _ in messages({"print"})}  # what is printed may be a table
    wrong = [
        f"{place}: {text}"
        for place, text in found
        if (place not in pages and "\n" in text)
        or len(text) > LONGEST
        or re.search(rf"\b({JARGON})\b", text)
    ]
    assert not wrong, "\n".join(wrong)


def test_messages_do_not_end_like_sentences_of_a_page() -> None:
    """One message is one line: it ends without a full stop, and begins with no capitals of alarm."""
    wrong = [
        f"{place}: {text}"
        for place, text in messages()
        if re.search(r"[^.]\.$", text) or re.match(r"(ERROR|WARNING|Error|Warning)\b", text)
    ]
    assert not wrong, "\n".join(wrong)
