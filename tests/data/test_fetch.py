"""What is fetched is whole and right, whatever happens on the way."""

import hashlib
import shutil
import sys
import types

import fsspec
import numpy as np
import pytest
from serving import serve

from physml.data import cards, fetch
from physml.data.cards import Source
from physml.errors import ConfigError, DataError, DependencyError

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serve() as (served, address):
        served.files["/set/a%20b.nc"] = CONTENT
        served.url = f"{address}/set/a%20b.nc"
        served.address = address
        yield served


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(fetch, "PIECE", 64_000)
    monkeypatch.setattr(fetch, "PAUSE", 0.001)


def put(url, content=CONTENT):
    with fsspec.open(url, "wb", auto_mkdir=True) as file:
        file.write(content)
    return url


@pytest.mark.parametrize("kind", ["http", "memory", "file"])
def test_a_url_is_fetched_with_its_checksum(server, tmp_path, kind):
    url = {"http": server.url, "memory": "memory://set/a b.nc", "file": f"file://{tmp_path}/set/a b.nc"}[kind]
    if kind != "http":
        put(url)
    result = fetch.fetch(url, tmp_path / "out", sha256=DIGEST.upper())
    assert (tmp_path / "out/a b.nc").read_bytes() == CONTENT
    assert result["files"] == {"a b.nc": {"bytes": len(CONTENT), "sha256": DIGEST}}
    assert (tmp_path / "out/SHA256SUMS").read_text() == f"{DIGEST}  a b.nc\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["SHA256SUMS", "a b.nc"]


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    fetch.fetch(server.url, tmp_path)
    before = server.total
    fetch.fetch(server.url, tmp_path)
    assert server.total == before == len(CONTENT)
    (tmp_path / "a b.nc").write_bytes(CONTENT[:-1] + b"?")  # damaged on disk: the recorded checksum tells
    fetch.fetch(server.url, tmp_path)
    assert (tmp_path / "a b.nc").read_bytes() == CONTENT


def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path):
    server.fail_after = 150_000
    with pytest.raises(DataError, match=r"cannot be reached .*by hand and put it at .*a b\.nc"):
        fetch.fetch(server.url, tmp_path)
    assert not (tmp_path / "a b.nc").exists()
    partial = (tmp_path / "a b.nc.partial").read_bytes()
    assert partial == CONTENT[: len(partial)]
    assert len(partial) >= 128_000
    server.fail_after, server.requested = None, []
    fetch.fetch(server.url, tmp_path)
    assert (tmp_path / "a b.nc").read_bytes() == CONTENT
    assert min(first for _, first in server.requested) == len(partial)
    assert not (tmp_path / "a b.nc.partial").exists()


def test_a_file_that_changed_meanwhile_begins_anew(server, tmp_path):
    server.fail_after = 150_000
    with pytest.raises(DataError):
        fetch.fetch(server.url, tmp_path)
    server.fail_after = None
    server.files["/set/a%20b.nc"] = new = CONTENT[::-1]
    fetch.fetch(server.url, tmp_path)
    assert (tmp_path / "a b.nc").read_bytes() == new


def test_a_server_without_ranges_or_versions_will_do(server, tmp_path):
    server.ranges = server.tags = False
    fetch.fetch(server.url, tmp_path)
    assert (tmp_path / "a b.nc").read_bytes() == CONTENT
    server.ranges = True
    (tmp_path / "a b.nc").rename(tmp_path / "a b.nc.partial")  # of which version is not known
    (tmp_path / "a b.nc.partial").write_bytes(b"x" * 1000)
    fetch.fetch(server.url, tmp_path)
    assert (tmp_path / "a b.nc").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=f"{DIGEST}, but {'0' * 64} was expected"):
        fetch.fetch(server.url, tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_fetches_nothing(server, tmp_path):
    plan = fetch.fetch(server.url, tmp_path / "out", dry_run=True)
    assert plan == {"would fetch": {"a b.nc": len(CONTENT)}, "bytes": len(CONTENT), "into": str(tmp_path / "out")}
    assert server.total == 0
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_fetching(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"0\.0 GiB free"):
        fetch.fetch(server.url, tmp_path)
    assert server.total == 0


def test_unreachable_places_say_what_to_do(server, tmp_path):
    for url in (f"{server.address}/absent.nc", "http://127.0.0.1:9/absent.nc", f"file://{tmp_path}/absent.nc"):
        with pytest.raises(DataError, match=r"absent\.nc .*by hand and put it at"):
            fetch.fetch(url, tmp_path / "out")
    with pytest.raises(DataError, match="no-such-protocol"):
        fetch.fetch("no-such-protocol://a/b.nc", tmp_path)
    with pytest.raises(ConfigError, match="name of a file"):
        fetch.fetch(f"{server.address}/", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        fetch.fetch(server.url, tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["../a.nc", "/etc/a.nc", "a/../../b.nc", "a\\b.nc", "", "a//b.nc", "C:/a", "x/SHA256SUMS"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="no name inside"):
        fetch._target(tmp_path, name)


def test_links_in_the_folder_are_not_followed_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data").symlink_to(tmp_path)
    with pytest.raises(DataError, match="no name inside"):
        fetch._target(tmp_path / "out", "data/a.nc")


# --- cards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(server, monkeypatch):
    """A card whose source is the local server."""
    server.files |= {"/set/train_1.nc": b"one", "/set/train_2.nc": b"two", "/set/test.nc": b"three"}
    urls = {f"{server.address}/set/{name}": None for name in ("train_1.nc", "train_2.nc", "test.nc")}
    urls[f"{server.address}/set/test.nc"] = hashlib.sha256(b"three").hexdigest()
    monkeypatch.setattr(cards, "source", lambda name: Source(name, urls=urls, files=("*.nc",)))
    return urls


def test_the_files_of_a_card_are_chosen_by_pattern(card, tmp_path):
    fetch.fetch("made", tmp_path / "all")
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"train_1.nc", "train_2.nc", "test.nc", "SHA256SUMS"}
    fetch.fetch("made", tmp_path / "some", files=("train_*", "absent"))
    assert {p.name for p in (tmp_path / "some").iterdir()} == {"train_1.nc", "train_2.nc", "SHA256SUMS"}
    with pytest.raises(ConfigError, match=r"No file of made matches valid.*It has train_1\.nc, train_2\.nc, test\.nc"):
        fetch.fetch("made", tmp_path / "none", files=("valid*",))
    with pytest.raises(ConfigError, match="single URL"):
        fetch.fetch("made", tmp_path / "none", sha256=DIGEST)


def test_a_repository_of_the_hub_is_fetched_with_its_checksums(tmp_path, monkeypatch):
    """The hub is played by a memory file system: names and checksums come from it, and a bad one is refused."""
    for name in ("stats.yaml", "data/train/a.hdf5", "data/test/b.hdf5", "README.md"):
        put(f"memory://hub/datasets/polymathic-ai/shear_flow/{name}", name.encode())
    digest = hashlib.sha256(b"data/test/b.hdf5").hexdigest()

    def hub(*wrong):
        def repo_info(self, name, repo_type, files_metadata):
            assert (name, repo_type, files_metadata) == ("polymathic-ai/shear_flow", "dataset", True)
            large = {"data/train/a.hdf5": "0" * 64 if wrong else None, "data/test/b.hdf5": digest}
            names = ["stats.yaml", "data/train/a.hdf5", "data/test/b.hdf5", "README.md"]
            siblings = [
                types.SimpleNamespace(rfilename=n, lfs=large.get(n) and types.SimpleNamespace(sha256=large[n]))
                for n in names
            ]
            return types.SimpleNamespace(siblings=siblings)

        return types.SimpleNamespace(HfApi=type("HfApi", (), {"repo_info": repo_info}))

    found = fetch.file_system
    monkeypatch.setattr(fetch, "file_system", lambda url, o: found(url.replace("hf://", "memory://hub/"), o))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub())
    fetch.fetch("the_well/shear_flow", tmp_path / "one", files=("data/test/*",))
    fetch.fetch("the_well/shear_flow", tmp_path / "all")
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {
        "one/SHA256SUMS", "one/data/test/b.hdf5", "all/SHA256SUMS", "all/stats.yaml", "all/data/train/a.hdf5",
        "all/data/test/b.hdf5",
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub("wrong"))
    with pytest.raises(DataError, match="0000 was expected"):
        fetch.fetch("the_well/shear_flow", tmp_path / "bad")


def test_without_the_hub_it_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    by_hand = rf"data/\* from https://huggingface.co/datasets/polymathic-ai/shear_flow and put them into {tmp_path}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=rf"pip install 'physml\[hub\]'.*{by_hand}"):
        fetch.fetch("the_well/shear_flow", tmp_path)

    def offline(self, *_, **__):
        raise ConnectionError("Name or service not known")

    hub = types.SimpleNamespace(HfApi=type("HfApi", (), {"repo_info": offline}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(DataError, match=rf"Name or service not known.*{by_hand}"):
        fetch.fetch("the_well/shear_flow", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("the_wel", "Did you mean 'the_well'"),
        ("the_well", "has several parts.*the_well/shear_flow"),
        ("the_well/sheer_flow", "Did you mean 'the_well/shear_flow'"),
        ("kolmogorov", "physml data generate kolmogorov"),
        ("pdebench", "By hand: download its files from https://doi.org/10.18419/darus-2986"),
    ],
)
def test_names_that_cannot_be_fetched_say_what_can_be_done(tmp_path, name, said):
    with pytest.raises(ConfigError, match=said):
        fetch.fetch(name, tmp_path)
