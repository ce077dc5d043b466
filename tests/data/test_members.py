import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessellar.data.image_file import UnreadableImage
from tessellar.data.tars.members import (
    FIELDS,
    UnreadableMember,
    captions_of,
    decode,
    label_of,
    split_name,
)
from tessellar.errors import UserError


@pytest.mark.parametrize(
    "name, expected",
    [
        ("000.jpg", ("000", "jpg")),
        ("a/b.c/d.JPEG", ("a/b.c/d", "jpeg")),
        ("./a/x.cls", ("a/x", "cls")),
        ("x.seg.png", None),
        ("x.mp4", None),
        ("README", None),
        (".hidden.png", None),
    ],
)
def test_names_are_split_at_the_first_dot_of_their_last_part(name: str, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize(
    "field, content, value",
    [
        ("cls", b" 7\n", 7),
        ("cls", b"\xef\xbb\xbf7", 7),
        ("txt", "é".encode(), "é"),
        ("json", b"[1]", [1]),
        ("json", "[1]".encode("utf-8-sig"), [1]),
    ],
)
def test_text_is_decoded(field: str, content: bytes, value):
    assert decode(field, content, "x") == value


def test_other_fields_are_not_decoded():
    with pytest.raises(UserError, match="only jpeg, jpg, png, webp, .*, json, txt, cls, npy are"):
        decode("pth", b"\x80\x04.", "x.pth")


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from(["..", ".", "", "a", "b.png", "/", "\\", "c.pkl", "\0"]), max_size=5
    ).map("/".join)
)
def test_no_key_leads_out_of_the_tar(name: str):
    try:
        parts = split_name(name)
    except UserError:
        return
    if parts is not None:
        assert (
            ".." not in parts[0].split("/") and not parts[0].startswith("/") and parts[1] in FIELDS
        )


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(FIELDS),
    st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: b"\x93NUMPY" + b)),
)
def test_any_content_is_decoded_or_named(field: str, content: bytes):
    try:
        decode(field, content, "shard.tar:x")
    except (UnreadableImage, UnreadableMember) as error:
        assert "shard.tar:x" in str(error) and "\n" not in str(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4
)


@settings(deadline=None, max_examples=50)
@given(st.one_of(values, st.dictionaries(st.sampled_from(["class", "caption", "other"]), values)))
def test_any_json_gives_a_class_and_a_caption_or_is_named(entries):
    fields = {"json": json.loads(json.dumps(entries))}
    try:
        label, captions = label_of(fields, "class", "x"), captions_of(fields, "caption", "x")
    except UnreadableMember as error:
        assert str(error).startswith("x: ")
        return
    assert label is None or label >= 0
    assert all(caption and caption.encode().decode() == caption for caption in captions)
