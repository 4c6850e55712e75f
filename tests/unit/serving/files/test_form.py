"""Multipart forms, cut at every place a network may cut them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.queue.errors import RequestError
from penstock.serving.errors import InvalidField
from penstock.serving.files.form import MAX_PARTS, Form, clean_filename

pytestmark = pytest.mark.unit
TYPE = "multipart/form-data; boundary=xyz"
CONTENT = b"line one\r\n--xy\r\nline\x00two\n--xyz-not-it\r\n"
FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="dir/in.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
    + CONTENT
    + b'\r\n--xyz\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600\r\n--xyz--\r\n'
)


@given(st.sets(st.integers(1, len(FORM) - 1)))
def test_cut_anywhere(cuts: set[int]) -> None:
    form, content, start = Form(TYPE), b"", 0
    for end in [*sorted(cuts), len(FORM)]:
        content += form.feed(FORM[start:end])
        start = end
    assert content == CONTENT
    assert form.fields == {"purpose": "batch", "expires_after[seconds]": "3600"}
    assert (form.filename, form.ended) == ("in.jsonl", True)


@given(st.binary(max_size=200))
def test_junk_is_refused_or_never_ends(junk: bytes) -> None:
    form = Form(TYPE)
    try:
        form.feed(junk)
    except RequestError:
        return
    assert not form.ended


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_no_form(content_type: str) -> None:
    with pytest.raises(InvalidField, match="multipart/form-data"):
        Form(content_type)


def test_two_files() -> None:
    part = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n'
    with pytest.raises(InvalidField, match="one file"):
        Form(TYPE).feed(part + part)


def test_many_parts() -> None:
    part = b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
    with pytest.raises(RequestError, match="parts"):
        Form(TYPE).feed(part * (MAX_PARTS + 1))


@given(st.text())
def test_a_clean_name_is_no_path(name: str) -> None:
    clean = clean_filename(name)
    assert clean
    assert not set(clean) & {"/", "\\", "\x00", "\n"}
    assert clean not in {".", ".."}
