"""Data sets of the Hugging Face hub: their parquet files, known by the hashes that the hub lists before any is fetched.

Files come from the branch of parquet files that the hub keeps of every data set, or else from the data set's own, into
the cache of huggingface_hub, where all programs find them. A store that is there needs neither them nor a network.
"""

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ddpm_fast.config import DataConfig
from ddpm_fast.data.parquet import asked_columns, look_through
from ddpm_fast.data.pictures import Contents, Source
from ddpm_fast.errors import InputError, nearest, require
from ddpm_fast.files import cache_directory, replace_file
from ddpm_fast.progress import Progress

Result = TypeVar("Result")

PREFIX = "hf:"
SHORT_NAMES = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "celeba": "flwrlabs/celeba",
    "flowers": "nkirschi/oxford-flowers",
}
PARQUET_BRANCH = "refs/convert/parquet"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r"-\d+-of-\d+.*$|-[0-9a-f]{16}$")
"""What follows the split in a file's name: train-00000-of-00001-12de94e121bdbead."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
"""Of errors that are not the network's."""


@dataclass(frozen=True)
class HubName:
    """What hf:NAME[:CONFIG[:SPLIT]] says."""

    repository: str
    config: str = ""
    split: str = ""

    def __str__(self) -> str:
        return PREFIX + self.repository


@dataclass(frozen=True)
class HubFile:
    """A parquet file of a data set."""

    path: str
    size: int
    sha256: str

    @property
    def place(self) -> tuple[str, str]:
        """Its configuration and split: of CONFIG/SPLIT/0000.parquet, as the hub's branch has it, or CONFIG/SPLIT-*."""
        path = PurePosixPath(self.path)
        split, folders = SHARD.sub("", path.stem), path.parts[:-1]
        if split.isdigit() and folders:
            split, folders = folders[-1], folders[:-1]
        config = "/".join(folders)
        return ("default" if config in ("", "data") else config), split


@dataclass(frozen=True)
class Listing:
    """The parquet files of one commit of a data set."""

    revision: str
    files: tuple[HubFile, ...]


def hub_name(data: str) -> HubName | None:
    """Return which data set of the hub --data names; None where it names none. Nothing is asked of any network.

    Raises:
        InputError: it has no name, or more parts.
    """
    if data in SHORT_NAMES:
        return HubName(SHORT_NAMES[data])
    if not data.startswith(PREFIX):
        return None
    parts = data.removeprefix(PREFIX).split(":")
    require(bool(parts[0]) and len(parts) <= 3, f"--data {data}: say hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return HubName(*parts)


def hub_source(name: HubName, data: DataConfig, progress: bool) -> tuple[Source, str]:
    """Return the pictures of a data set of the hub as a source, and its revision, a commit's hash.

    Raises:
        InputError: the hub cannot be reached, or has no such data set, revision, configuration or split.
    """
    listing = _listing(name, data.revision)
    files = _chosen(name, listing.files)

    def look() -> Contents:
        return look_through(str(name), _fetched(name, files, listing.revision, progress), data)

    identity = (*asked_columns(data), *(bytes.fromhex(file.sha256) for file in files))
    return Source(str(name), identity, look), listing.revision


def _chosen(name: HubName, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files of the configuration and split that are meant, in their order."""
    require(bool(files), f"--data {name} has no parquet files: fetch it yourself, and name its folder of images")
    configs = sorted({file.place[0] for file in files})
    config = name.config or ("default" if "default" in configs else configs[0] if len(configs) == 1 else "")
    require(bool(config), f"--data {name} has the configurations {', '.join(configs)}: name one, {name}:{configs[0]}")
    has = f"it has {', '.join(configs)}.{nearest(config, configs)}"
    require(config in configs, f"--data {name} has no configuration {config}: {has}")
    splits = sorted({file.place[1] for file in files if file.place[0] == config})
    split = name.split or ("train" if len(splits) > 1 else splits[0])
    has = f"it has {', '.join(splits)}: name one, {name}:{config}:{splits[0]}"
    require(split in splits, f"--data {name} has no split {split}: {has}")
    return sorted((file for file in files if file.place == (config, split)), key=lambda file: file.path)


def _listing(name: HubName, revision: str) -> Listing:
    """Return a commit's parquet files: from the cache, where that commit was asked for before, or from the hub."""
    known = _read_listing(name, revision) if COMMIT.fullmatch(revision) else None
    if known is not None:
        return known
    asked = [revision] if revision else [PARQUET_BRANCH, None]
    for of in asked:
        with contextlib.suppress(_NoRevisionError):
            found = _ask(name, of)
            if found.files or of == asked[-1]:
                with contextlib.suppress(InputError):  # a cache that cannot be written costs a question, no more
                    replace_file(_place(name, found.revision), json.dumps(asdict(found)).encode())
                return found
    raise InputError(f"--data {name} has no revision {revision}: leave --revision out for the newest")


class _NoRevisionError(Exception):
    pass


def _ask(name: HubName, revision: str | None) -> Listing:
    """Ask the hub for the files of a branch or commit."""
    from huggingface_hub import HfApi

    def ask(token: bool | None) -> Listing:
        info = HfApi().dataset_info(name.repository, revision=revision, files_metadata=True, token=token, timeout=60)
        siblings = [entry for entry in info.siblings or [] if entry.rfilename.endswith(".parquet")]
        require(
            all(entry.lfs is not None for entry in siblings),
            f"--data {name}: the hub does not say what its files hold: fetch them yourself, and name their folder",
        )
        files = [HubFile(entry.rfilename, entry.lfs.size, entry.lfs.sha256) for entry in siblings if entry.lfs]
        return Listing(str(info.sha), tuple(files))

    return _reaching(name, ask)


def _reaching(name: HubName, ask: Callable[[bool | None], Result]) -> Result:
    """Ask the hub.

    No token is sent at first: only where that is refused, and the user has logged in, is the question asked by name.

    Raises:
        InputError: what is wrong, in one line.
        _NoRevisionError: only the revision is not there.
    """
    from huggingface_hub import errors, get_token

    with _in_one_line(name):
        try:
            return ask(False)
        except errors.RepositoryNotFoundError:  # nor is one that is private or gated shown to strangers
            if not get_token():
                raise
            return ask(None)


@contextlib.contextmanager
def _in_one_line(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into one line."""
    from huggingface_hub import constants, errors

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library, whichever it is
    hub, unreachable = constants.ENDPOINT, f"--data {name}: {constants.ENDPOINT} cannot be reached"
    try:
        yield
    except errors.GatedRepoError:
        page = f"{hub}/datasets/{name.repository}"
        raise InputError(f"--data {name} is gated: accept its terms on {page}, and run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"--data {name} does not exist on {hub}, or is private: run hf auth login") from None
    except errors.RevisionNotFoundError:
        raise _NoRevisionError from None
    except errors.HFValidationError:
        raise InputError(f"--data {name} is no name that a data set can have: say hf:OWNER/NAME") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{unreachable} for its files: try again with a network") from None
    except (http_error, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = constants.HF_HUB_CACHE
            raise InputError(f"cannot write {where}: {error.strerror}; set HF_HOME elsewhere") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{unreachable} ({reason}): try again, or name files of your own") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{unreachable}: what answers there is no hub ({type(error).__name__})") from None


def _fetched(name: HubName, files: Sequence[HubFile], revision: str, progress: bool) -> list[Path]:
    """Return the files on the disk, fetched where they are not there yet, or are not what the hub lists."""
    from huggingface_hub import hf_hub_download

    with Progress("fetching", max(1, sum(file.size for file in files) // 10**6), "MB", progress) as shown:
        bars = _bars(shown)

        def fetched(file: HubFile) -> Path:
            for again in (False, True):

                def fetch(token: bool | None, again: bool = again) -> str:
                    return hf_hub_download(
                        name.repository,
                        file.path,
                        repo_type="dataset",
                        revision=revision,
                        token=token,
                        tqdm_class=bars,
                        force_download=again,
                    )

                path = Path(_reaching(name, fetch))
                with path.open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                        return path
            raise InputError(f"--data {name}: {file.path} comes otherwise than the hub lists it: try again later")

        try:
            return [fetched(file) for file in files]
        except _NoRevisionError:
            raise InputError(f"--data {name} has no revision {revision} any more: leave --revision out") from None


def _bars(shown: Progress) -> Any:
    """Return what huggingface_hub takes for a class of progress bars: bytes that arrive are counted as megabytes."""
    arrived = 0

    class Bar:
        def __init__(self, *_: Any, **options: Any) -> None:
            self.update(options.get("initial") or 0)

        def update(self, size: float | None = 1) -> None:
            nonlocal arrived
            arrived += int(size or 0)
            shown.advance(arrived // 10**6 - shown.done)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Callable[..., None]:  # whatever else a bar can do, this one does not
            return lambda *_, **__: None

    return Bar


def _place(name: HubName, revision: str) -> Path:
    text = f"{name.repository} {revision}"
    return cache_directory() / f"{hashlib.blake2b(text.encode(), digest_size=20).hexdigest()}.hub"


def _read_listing(name: HubName, revision: str) -> Listing | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads(_place(name, revision).read_text())
        files = tuple(
            HubFile(str(f["path"]), int(f["size"]), bytes.fromhex(f["sha256"]).hex()) for f in values["files"]
        )
        return Listing(str(values["revision"]), files)
    return None
