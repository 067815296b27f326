"""Data sets of the hub, by its real client against a server of our own: nothing here reaches another machine."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")
import huggingface_hub
from huggingface_hub import constants

from ddpm_fast.config import DataConfig
from ddpm_fast.data import hub
from ddpm_fast.data.dataset import Dataset, open_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import cache_directory
from tests.data.hub_stand_in import Repository, StandIn, commit_of
from tests.data.test_parquet import FEATURES, UNET, check, columns, write


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Two files of a split and one of another, as the hub's branch of parquet files has them."""
    parts = {"default/train/0000": (0, 4), "default/train/0001": (4, 7), "default/test/0000": (7, 9)}
    written = {name: write(tmp_path / f"{name}.parquet", columns(*rows), FEATURES) for name, rows in parts.items()}
    return {f"{name}.parquet": file.read_bytes() for name, file in written.items()}


@pytest.fixture
def server(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub with one data set, a token that nobody should see, and no way to any other machine."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_secret")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    with StandIn({"someone/pets": Repository({"README.md": b"# pets"}, dict(files))}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        connect = socket.socket.connect

        def to_ourselves_only(self: socket.socket, address: tuple[str, int]) -> None:
            assert address[0] == "127.0.0.1", address
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", to_ourselves_only)
        yield server
    huggingface_hub.close_session()


def opened(data: str, **options) -> Dataset:
    return open_dataset(DataConfig(data=data, **options), UNET)


def test_what_is_meant_where_no_configuration_or_split_is_named(server):
    converted = server.repositories["someone/pets"].converted
    assert converted is not None
    commit = commit_of(converted)
    for which in ("", ":default", ":default:train", "::train"):
        dataset = opened(f"hf:someone/pets{which}")
        check(dataset, list(range(7)))
        assert dataset.revision == commit
    resolved = [path for path in server.asked if "/resolve/" in path]
    assert sorted(set(resolved)) == [
        f"/datasets/someone/pets/resolve/{commit}/default/train/{i:04}.parquet" for i in range(2)
    ]
    assert server.tokens == [None] * len(server.tokens)  # a public data set is nobody's business
    check(opened("hf:someone/pets:default:test"), [7, 8])


def test_equal_files_are_the_same_data_set_wherever_they_lie(server, files, tmp_path):
    assert opened("hf:someone/pets").fingerprint == opened(str(tmp_path / "default/train")).fingerprint


def test_a_run_stays_with_its_revision_when_the_hub_goes_on(server, files):
    first = opened("hf:someone/pets")
    repository = server.repositories["someone/pets"]
    repository.converted = {"default/train/0000.parquet": files["default/test/0000.parquet"]}
    (cache_directory() / f"{first.fingerprint}.npy").unlink()
    again = opened("hf:someone/pets", revision=first.revision)
    assert (again.fingerprint, again.revision) == (first.fingerprint, first.revision)
    np.testing.assert_array_equal(again.images, first.images)
    assert opened("hf:someone/pets").fingerprint != first.fingerprint  # a new run takes what is there now


def test_the_repository_s_own_files_serve_where_the_hub_has_made_none(server, files):
    contents = list(files.values())
    own = {"data/train-00000-of-00002-12de94e121bdbead.parquet": contents[0]}
    own |= {
        "data/train-00001-of-00002-96eeec628415add6.parquet": contents[1],
        "data/test-00000-of-00001.parquet": contents[2],
    }
    server.repositories["someone/own"] = Repository(own)
    dataset = opened("hf:someone/own")
    check(dataset, list(range(7)))
    assert dataset.revision == commit_of(own)


def test_short_names_are_data_sets_of_the_hub_unless_something_here_is_called_so(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    server.repositories |= dict.fromkeys(hub.SHORT_NAMES.values(), server.repositories["someone/pets"])
    for short, name in hub.SHORT_NAMES.items():
        check(opened(short), list(range(7)))
        assert f"/api/datasets/{name}/revision/refs/convert/parquet" in server.asked
    (tmp_path / "default/train").rename(tmp_path / "mnist")
    server.asked.clear()
    assert opened("mnist").revision == ""
    assert server.asked == []
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        opened("cifar-10")
    assert server.asked == []


def test_a_gated_data_set_is_asked_for_by_name_if_there_is_one(server, monkeypatch):
    server.repositories["someone/pets"] = replace(server.repositories["someone/pets"], gated=True)
    check(opened("hf:someone/pets"), list(range(7)))
    assert set(server.tokens) == {None, "Bearer hf_secret"}
    Path(constants.HF_TOKEN_PATH).unlink()
    with pytest.raises(
        InputError, match=r"hf:someone/pets is gated: accept its terms on .*/datasets/someone/pets, and"
    ):
        opened("hf:someone/pets")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("hf:someone/nothing", "hf:someone/nothing does not exist on"),
        ("hf:someone/pets:other", r"has no configuration other: it has default\."),
        (
            "hf:someone/pets:default:valid",
            "has no split valid: it has test, train: name one, hf:someone/pets:default:test",
        ),
        ("hf:a/b/c", "is no name that a data set can have"),
        ("hf:", "say hf:NAME"),
        ("hf:a:b:c:d", "say hf:NAME"),
        ("hf:someone/text", "has no parquet files"),
        ("hf:someone/many", "has the configurations big, small: name one, hf:someone/many:big"),
    ],
)
def test_what_is_not_there_is_one_line(server, files, data, says):
    train = files["default/train/0000.parquet"]
    server.repositories["someone/text"] = Repository({"a.csv": b"1"})
    server.repositories["someone/many"] = Repository(
        {}, {f"{size}/train/0000.parquet": train for size in ("big", "small")}
    )
    with pytest.raises(InputError, match=says) as refused:
        opened(data)
    assert "\n" not in str(refused.value)
    assert not list(cache_directory().glob("*.npy"))


def test_a_revision_that_is_not_there_and_a_column_that_is_no_image_are_one_line(server):
    with pytest.raises(InputError, match=f"has no revision {'3' * 40}: leave --revision out"):
        opened("hf:someone/pets", revision="3" * 40)
    with pytest.raises(InputError, match="--image-column label is int64, which is no image"):
        opened("hf:someone/pets", image_column="label")


def test_a_file_that_arrives_otherwise_than_it_is_listed_is_refused_and_a_damaged_one_fetched_again(server, files):
    path = "default/train/0001.parquet"
    server.swapped[path] = files[path][:-50] + bytes(50)
    with pytest.raises(InputError, match=r"hf:someone/pets: .*0001\.parquet comes otherwise than the hub lists it"):
        opened("hf:someone/pets")
    assert not list(cache_directory().glob("*.npy"))
    server.swapped.clear()
    check(opened("hf:someone/pets"), list(range(7)))


def test_without_a_network_it_is_one_line_and_a_revision_that_is_here_is_read(server, monkeypatch):
    first = opened("hf:someone/pets")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(InputError, match=r"hf:someone/pets: http://127.* cannot be reached \(.*\): try again"):
        opened("hf:someone/pets")
    for left in (False, True):
        again = opened("hf:someone/pets", revision=first.revision)
        check(again, list(range(7)))
        assert again.fingerprint == first.fingerprint
        if not left:
            (cache_directory() / f"{first.fingerprint}.npy").unlink()  # it is made again of the files that are here


def test_what_is_no_hub_is_one_line(server, monkeypatch):
    monkeypatch.setattr("tests.data.hub_stand_in._info", lambda *_: ["no", "data", "set"])
    with pytest.raises(InputError, match="what answers there is no hub"):
        opened("hf:someone/pets")


def test_without_the_extra_it_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'ddpm-fast\[hub\]'"):
        opened("mnist")
