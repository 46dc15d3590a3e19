"""Against a small server in this process that can break off, change its file, and answer ranges."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayexp.data import download as downloads
from rayexp.data import tiny_imagenet, wikitext2
from rayexp.data.download import download
from rayexp.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path not in server.files:
            self.send_error(404)
            return
        data, tag, start = server.files[self.path], server.tag, 0
        if (span := self.headers.get("Range")) and self.headers.get("If-Range") == tag and server.ranges:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = len(data)
        if server.breaks:  # send so many bytes of the file and hang up
            stop = max(start, server.breaks.pop(0))
        self.wfile.write(data[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
    monkeypatch.setattr(downloads, "BLOCK", 1000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.tag, server.ranges, server.breaks, server.asked = {}, '"v1"', True, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "downloads").iterdir() if not p.name.endswith(".lock"))


DATA = bytes(range(256)) * 100


def test_once(server, cache):
    server.files["/x%20y.zip"] = DATA
    path = download(server.url + "/x%20y.zip")
    assert path.read_bytes() == DATA
    assert path.name.endswith("-x y.zip")
    assert download(server.url + "/x%20y.zip") == path
    assert server.asked == [None]
    assert leftovers(cache) == [path.name]


def test_where_there_is_no_flock(server, cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    server.files["/a.zip"] = DATA
    assert download(server.url + "/a.zip").read_bytes() == DATA
    assert leftovers(cache) == [next((cache / "downloads").glob("*-a.zip")).name]


def test_goes_on_after_breaks(server, cache):
    server.files["/a.zip"] = DATA
    server.breaks = [5_000, 5_000, 12_345]
    assert download(server.url + "/a.zip").read_bytes() == DATA
    assert server.asked[:2] == [None, "bytes=5000-"]
    assert server.asked[-1] == "bytes=12000-"  # whole blocks are kept


def test_goes_on_in_a_later_call(server, cache):
    server.files["/a.zip"] = DATA
    server.breaks = [9_000] + [0] * (downloads.ATTEMPTS - 1)
    with pytest.raises(UserError, match=r"a\.zip: cannot be downloaded .*the same command tries again"):
        download(server.url + "/a.zip")
    server.asked.clear()
    assert download(server.url + "/a.zip").read_bytes() == DATA
    assert server.asked == ["bytes=9000-"]


@pytest.mark.parametrize("change", ["other version", "no ranges", "no tag"])
def test_starts_over_where_it_must(server, cache, change):
    server.files["/a.zip"] = DATA
    server.breaks = [9_000] + [0] * (downloads.ATTEMPTS - 1)
    server.tag = None if change == "no tag" else server.tag
    with pytest.raises(UserError):
        download(server.url + "/a.zip")
    server.files["/a.zip"] = DATA[::-1]
    server.tag = '"v2"' if change == "other version" else server.tag
    server.ranges = change != "no ranges"
    assert download(server.url + "/a.zip").read_bytes() == DATA[::-1]


def test_all_there_already(server, cache):
    """A crash between the last byte and the renaming."""
    server.files["/a.zip"] = DATA
    path = download(server.url + "/a.zip")
    path.rename(path.with_name(f".tmp-{path.name}"))
    path.with_name(f".tmp-{path.name}.version").write_text('"v1"')
    assert download(server.url + "/a.zip").read_bytes() == DATA


def test_checksum(server, cache):
    server.files["/a.zip"] = DATA
    with pytest.raises(UserError, match=r"a\.zip: what came is not the published file"):
        download(server.url + "/a.zip", "sha256:" + "0" * 64)
    assert leftovers(cache) == []
    good = hashlib.sha256(DATA).hexdigest()
    assert download(server.url + "/a.zip", f"sha256:{good}").read_bytes() == DATA


def test_refused_by_the_server(server, cache):
    with pytest.raises(UserError, match=r"nothing\.zip: the server refuses \(404"):
        download(server.url + "/nothing.zip")
    assert leftovers(cache) == []


def test_nobody_there(cache, monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=r"a\.zip: cannot be downloaded \(.*refused") as caught:
        download("http://127.0.0.1:9/a.zip")
    assert "\n" not in str(caught.value)


def test_fetch_from_a_url(server, cache, tmp_path, tiny):
    server.files["/t.zip"] = tiny.write_zip(tmp_path / "a.zip", tiny.layout()).read_bytes()
    url = server.url + "/t.zip"
    assert tiny_imagenet.fetch(url, tmp_path / "d") is True
    assert tiny_imagenet.fetch(url, tmp_path / "d") is False
    assert len(server.asked) == 1
    server.files["/broken.zip"] = server.files["/t.zip"][:3000]
    with pytest.raises(UserError, match="not a ZIP archive, or a truncated one"):
        tiny_imagenet.fetch(server.url + "/broken.zip", tmp_path / "e")
    assert not (tmp_path / "e").exists()


PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"


@pytest.mark.parametrize("page", [PAGE, b"", b"\x1f\x8b not gzip", b"PK\x03\x04 cut"])
def test_what_is_no_archive_is_not_cached(server, cache, tmp_path, tiny, page):
    """A portal, or a proxy's error, with status 200: the next call fetches what was meant."""
    server.files["/t.zip"] = page
    url = server.url + "/t.zip"
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"t\.zip: .* not a .* archive, or a truncated one .*; it is not kept"
        ) as caught:
            tiny_imagenet.fetch(url, tmp_path / "d")
        assert "\n" not in str(caught.value)
        assert ("it is a web page" in str(caught.value)) is (page is PAGE)
        assert leftovers(cache) == []
    server.files["/t.zip"] = tiny.write_zip(tmp_path / "a.zip", tiny.layout()).read_bytes()
    assert tiny_imagenet.fetch(url, tmp_path / "d") is True
    assert len(server.asked) == 3


def test_a_page_in_place_of_wikitext_is_asked_for_once(server, cache, tmp_path):
    server.files["/w.zip"] = PAGE
    with pytest.raises(UserError, match="not kept"):
        wikitext2.fetch(server.url + "/w.zip", tmp_path / "d")
    assert len(server.asked) == 1
    assert leftovers(cache) == []


def test_a_page_that_was_cached_before(server, cache, tmp_path, tiny):
    """An older rayexp kept it."""
    server.files["/t.zip"] = PAGE
    kept = download(server.url + "/t.zip")
    with pytest.raises(UserError, match="not kept"):
        tiny_imagenet.fetch(server.url + "/t.zip", tmp_path / "d")
    assert not kept.exists()


def test_a_good_archive_of_something_else_is_kept(server, cache, tmp_path, tiny):
    server.files["/t.zip"] = tiny.write_zip(tmp_path / "a.zip", {"x": b"1"}).read_bytes()
    with pytest.raises(UserError, match=r"t\.zip: no wnids\.txt in it"):
        tiny_imagenet.fetch(server.url + "/t.zip", tmp_path / "d")
    assert len(leftovers(cache)) == 1


def test_a_tar_from_a_url(server, cache, tmp_path, tiny):
    server.files["/t.tgz"] = tiny.write_tar(tmp_path / "a.tgz", tiny.layout()).read_bytes()
    assert tiny_imagenet.fetch(server.url + "/t.tgz", tmp_path / "d") is True
    assert tiny_imagenet.fetch(server.url + "/t.tgz", tmp_path / "d") is False
