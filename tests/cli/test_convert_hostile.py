"""`convert.py` on files that are cut, changed or something else: one line and exit code 2, and nothing is written."""

import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.convert import main
from tessellar.cli.errors import run
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
EXAMPLES = settings(max_examples=8)


def code(*words: Any) -> int:
    """Exit code; an error is one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        result = run(lambda: main([str(word) for word in words]))
    errors = err.getvalue().splitlines()
    assert (result == 0) == (not errors) and len(errors) <= 1, errors
    assert not errors or errors[0].startswith("error: ")
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, and a generator's weights as the official code writes them."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    export_tokenizer(ViTVQ(VectorQuantizer(96, 4), 16, 4, 16, 1, 1, 2).eval(), folder / "vq")
    state, _ = read_safetensors(GOLDEN / "weights_c2i.safetensors")
    torch.save({"model": state}, folder / "c2i.pt")
    return folder


def copy_of(root: Path) -> Path:
    copy = root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(root / "vq", copy))


def importing(root: Path, file: Path) -> list[Any]:
    return [
        "import",
        "llamagen",
        file,
        "--tokenizer",
        root / "vq",
        "--num-heads",
        3,
        "--out",
        root / "out",
    ]


def test_the_untouched_files_are_taken(root: Path) -> None:
    assert code("info", root / "vq") == 0
    assert code(*importing(root, root / "c2i.pt")) == 0
    shutil.rmtree(root / "out")


@EXAMPLES
@given(
    content=st.binary(max_size=200),
    suffix=st.sampled_from([".pt", ".ckpt", ".safetensors", ".bin"]),
)
def test_any_bytes_are_refused(root: Path, content: bytes, suffix: str) -> None:
    file = root / f"any{suffix}"
    file.write_bytes(content)
    assert code("info", file) == 2
    assert code(*importing(root, file)) == 2
    assert code("export", file, "--out", root / "out") == 2
    assert not (root / "out").exists()


@EXAMPLES
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_cut_anywhere_are_refused(root: Path, share: float) -> None:
    whole = (root / "c2i.pt").read_bytes()
    (root / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    assert code(*importing(root, root / "cut.pt")) == 2
    assert not (root / "out").exists()


@EXAMPLES
@given(data=st.data())
def test_a_tensor_lost_renamed_reshaped_or_no_number_is_named(
    root: Path, data: st.DataObject
) -> None:
    state, _ = read_safetensors(GOLDEN / "weights_c2i.safetensors")
    name = data.draw(st.sampled_from(sorted(name for name in state if "freqs" not in name)))
    match data.draw(st.sampled_from(["lost", "renamed", "reshaped", "text"])):
        case "lost":
            del state[name]
        case "renamed":
            state[f"{name}_"] = state.pop(name)
        case "reshaped":
            state[name] = state[name][None]
        case "text":
            state[name] = "text"  # type: ignore[assignment]
    torch.save({"model": state}, root / "changed.pt")
    assert code(*importing(root, root / "changed.pt")) == 2
    assert not (root / "out").exists()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**12),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
)


@EXAMPLES
@given(data=st.data(), value=VALUES)
def test_any_value_in_an_exports_description_is_taken_or_refused(
    root: Path, data: st.DataObject, value: Any
) -> None:
    folder = copy_of(root)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    node = config
    while True:  # walk down to a place of any depth
        key = data.draw(st.sampled_from(sorted(node)))
        if isinstance(node[key], dict) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
        else:
            break
    node[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert code("info", folder) in (0, 2)
    assert code("export", folder, "--out", root / "again", "--overwrite") in (0, 2)


@EXAMPLES
@given(data=st.data())
def test_changed_bytes_of_an_export_are_taken_or_refused(root: Path, data: st.DataObject) -> None:
    folder = copy_of(root)
    file = folder / data.draw(st.sampled_from(["config.yaml", "model.safetensors"]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, min(len(content), 2000) - 1))
    content[place : place + 3] = data.draw(st.binary(min_size=1, max_size=6))
    file.write_bytes(content)
    assert code("info", folder) in (0, 2)
