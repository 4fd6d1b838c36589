"""A folder of files, on this machine or behind any URL that fsspec knows (`s3://bucket/clips`, `gs://`, `az://` ...).

Credentials and endpoints come from the environment, as the store's own tools read them (for S3 AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from wan_core.config import check
from wan_core.memory import recall, remember
from wan_core.records import digest

type Location = str | Path  # of a folder of clips: a path, or a URL as text (a Path would fold its slashes)

BATCH = 1000
SMALL_BYTES = 1 << 20
SETTLED_SECONDS = 2.0  # a file changed this lately could change again within one tick of the file system's clock
KEPT_DOWNLOADS = 2  # clips cut from one file follow one another
# What stores call the digest or version that they keep of an object's content, the best first.
CONTENT_TAGS = ("md5Hash", "ETag", "etag")


class File(NamedTuple):
    """A file of a folder, as the listing shows it."""

    name: str  # relative to the folder, with /
    size: int  # bytes
    version: str  # changes when the content does


class ChangedError(OSError):
    """A file is not the one that was planned."""


class Folder(Protocol):
    def files(self) -> Iterator[File]:
        """Every file below the folder, in no order, except hidden ones and those in hidden folders."""

    def problems(self) -> list[tuple[str, str]]:
        """(name, reason) of what `files` met and could not list."""

    def read(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        """The content of small files."""

    def digests(self, files: Sequence[File]) -> Iterator[str | OSError]:
        """An identity of each file's content, sha256 in hex, reading as little as possible."""

    def local(self, name: str, wanted: str) -> contextlib.AbstractContextManager[Path]:
        """The file as a path of this machine, of the digest `wanted` where looking costs nothing.

        Raises:
            OSError: it cannot be read, or is another than the one wanted.
        """


def is_url(location: Location) -> bool:
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def open_folder(location: Location) -> Folder:
    if is_url(location):
        return RemoteFolder(str(location))
    return LocalFolder(Path(str(location).removeprefix("file://")))


def checked_folder(location: Location) -> Location:
    """The location, a path made absolute; looked at before any work starts.

    Raises:
        ValueError: it does not exist, or cannot be reached.
    """
    if not is_url(location):
        folder = Path(str(location).removeprefix("file://"))
        check(folder.is_dir(), f"videos={folder} is not a folder; give the folder that holds the clips and captions")
        return str(folder.absolute())
    remedy = "check the URL, and the credentials in the environment"
    try:
        listed = RemoteFolder(str(location)).exists()
    except Exception as error:  # each store has errors of its own
        raise ValueError(f"videos={location} cannot be reached: {type(error).__name__}: {error}; {remedy}") from error
    check(listed, f"videos={location} does not exist or is empty; {remedy}")
    return location


class LocalFolder:
    def __init__(self, root: Path) -> None:
        check(root.is_dir(), f"video folder {root} does not exist; give the folder that holds the clips")
        self.root = str(root.resolve())
        self._problems: list[tuple[str, str]] = []

    def files(self) -> Iterator[File]:
        self._problems = []
        top = os.stat(self.root)
        # Folders to list, each with the folders that it lies in.
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((top.st_dev, top.st_ino),))]
        while waiting:
            folder, above = waiting.pop()
            try:
                entries = os.scandir(os.path.join(self.root, folder))
            except OSError as error:
                self._problems.append((folder, f"folder cannot be listed: {error.strerror}"))
                continue
            with entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = folder + entry.name
                    try:
                        status = entry.stat()
                        if entry.is_dir():
                            identity = (status.st_dev, status.st_ino)
                            if identity in above:
                                self._problems.append((name, "symbolic link to a folder that it lies in; remove it"))
                            else:
                                waiting.append((f"{name}/", (*above, identity)))
                        elif entry.is_file():
                            yield File(name, status.st_size, f"{status.st_ino} {status.st_mtime_ns}")
                    except OSError as error:
                        self._problems.append((name, f"cannot be read: {error.strerror}"))

    def problems(self) -> list[tuple[str, str]]:
        return self._problems

    def read(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        for name in names:
            try:
                with open(f"{self.root}/{name}", "rb", buffering=0) as file:
                    yield file.read()
            except OSError as error:
                yield error

    def digests(self, files: Sequence[File]) -> Iterator[str | OSError]:
        """Of the bytes; remembered by path, size, inode and time of change."""
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(files), BATCH):
                yield from self._digests(files[i : i + BATCH], pool)

    def _digests(self, files: Sequence[File], pool: ThreadPoolExecutor) -> list[str | OSError]:
        keys = [f"sha256 {self.root}/{file.name}" for file in files]
        known = recall(keys)
        found: list[str | OSError | Future[str | OSError]] = []
        for key, file in zip(keys, files, strict=True):
            before, _, value = known.get(key, "").rpartition(" ")
            if before == f"{file.size} {file.version}":
                found.append(value)
            elif file.size < SMALL_BYTES:  # threads would only fight for the interpreter's lock
                found.append(self._hashed(file))
            else:
                found.append(pool.submit(self._hashed, file))
        digests = [value.result() if isinstance(value, Future) else value for value in found]
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        remember(
            (key, f"{file.size} {file.version} {value}")
            for key, file, value in zip(keys, files, digests, strict=True)
            if known.get(key) != f"{file.size} {file.version} {value}"
            and isinstance(value, str)
            and int(file.version.partition(" ")[2]) < settled
        )
        return digests

    def _hashed(self, file: File) -> str | OSError:
        try:
            with open(f"{self.root}/{file.name}", "rb", buffering=0) as stream:
                if file.size < SMALL_BYTES:
                    return hashlib.sha256(stream.read()).hexdigest()
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return error

    @contextlib.contextmanager
    def local(self, name: str, wanted: str) -> Iterator[Path]:
        yield Path(self.root, name)


class RemoteFolder:
    """Objects are downloaded one at a time into files without a name, which are gone when no longer open."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.store, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:  # says which package to install
            raise ValueError(f"videos={url} cannot be opened: {error}") from error
        self.url, self.root = url.rstrip("/"), root.rstrip("/")
        self._lock = threading.Lock()
        self._downloads: OrderedDict[str, Future[IO[bytes]]] = OrderedDict()

    def exists(self) -> bool:
        return bool(self.store.isdir(self.root))

    def files(self) -> Iterator[File]:
        for path, info in self.store.find(self.root, detail=True).items():
            name = path[len(self.root) + 1 :]
            if info["type"] == "file" and name and not name.endswith("/") and "/." not in f"/{name}":
                yield File(name, int(info["size"]), _version(info))

    def problems(self) -> list[tuple[str, str]]:
        return []

    def read(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        for i in range(0, len(names), BATCH):
            paths = [f"{self.root}/{name}" for name in names[i : i + BATCH]]
            found = self.store.cat(paths, on_error="return")
            for path in paths:
                value = found[path]
                if isinstance(value, Exception) and not isinstance(value, OSError):
                    raise value
                yield value

    def digests(self, files: Sequence[File]) -> Iterator[str | OSError]:
        """Of the store's own tag and the size, so that no object is read; of the bytes where the store keeps no tag."""

        with ThreadPoolExecutor() as pool:
            tags = (file.version.startswith("tag ") for file in files)
            yield from (map if all(tags) else pool.map)(self._digest, files)

    def _digest(self, file: File) -> str | OSError:
        if file.version.startswith("tag "):
            return _tagged(file.version, file.size)
        key, state = f"sha256 {self.url}/{file.name}", f"{file.size} {file.version}"
        before, _, value = recall([key]).get(key, "").rpartition(" ")
        if before == state:
            return value
        try:
            with self.store.open(f"{self.root}/{file.name}", "rb") as stream:
                value = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return error
        if file.version != "changed ":  # a store that knows no time of change
            remember([(key, f"{state} {value}")])
        return value

    @contextlib.contextmanager
    def local(self, name: str, wanted: str) -> Iterator[Path]:
        with self._lock:
            download = self._downloads.get(name)
            mine = download is None
            if download is None:
                download = self._downloads[name] = Future()
                while len(self._downloads) > KEPT_DOWNLOADS:  # whoever still reads one holds it open
                    self._downloads.popitem(last=False)
        if mine:
            try:
                download.set_result(self._download(name, wanted))
            except BaseException as error:
                with self._lock:
                    self._downloads.pop(name, None)
                download.set_exception(error)
        file = download.result()
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")

    def _download(self, name: str, wanted: str) -> IO[bytes]:
        path = f"{self.root}/{name}"
        info = self.store.info(path)
        if (version := _version(info)).startswith("tag ") and _tagged(version, int(info["size"])) != wanted:
            raise ChangedError("the object has changed since the run was planned; run again")
        file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever reads the clip closes it by letting go
        try:
            self.store.get_file(path, f"/proc/{os.getpid()}/fd/{file.fileno()}")
        except BaseException:
            file.close()
            raise
        return file


def _version(info: dict[str, Any]) -> str:
    for key in CONTENT_TAGS:
        if info.get(key):
            return f"tag {str(info[key]).strip(chr(34))}"
    changed = next((info[key] for key in ("mtime", "LastModified", "last_modified", "created") if info.get(key)), "")
    return f"changed {str(changed).replace(' ', 'T')}"


def _tagged(version: str, size: int) -> str:
    return digest([version, size])
